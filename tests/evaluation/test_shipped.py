"The weights of the package are as good as their record says."
import pytest
import torch
from readme import root

from flowtok.toy.scores import image_to_text_scores
from flowtok.toy.variety import image_scores, references_of, spread_ratio, variety_prompts
from flowtok.lab.records import read_record
from flowtok.pipeline import FlowTokPipeline

N = 200


@pytest.fixture(scope='module')
def pipe():
    return FlowTokPipeline.from_pretrained()


@pytest.fixture(scope='module')
def stated():
    return {row['split']: row for row in read_record(root / 'papers_results' / 'tiny').metrics['variety'] if row['model'] == 'this model'}


@pytest.mark.parametrize('split', ['held_out', 'seen'])
def test_images_have_the_stated_accuracy_and_variety(pipe, stated, split):
    def generate(prompts, seed=0):
        return pipe(prompts, generator=torch.Generator().manual_seed(seed), output_type='pt', text_at_decoding=False)
    prompts = variety_prompts(split, N)
    scores = image_scores(generate(prompts), references_of(prompts), draws=0)
    assert scores['accuracy (%)'] > stated[split]['accuracy (%)'] - 6            # about two standard errors of 200
    assert scores['tone TV'] < stated[split]['tone TV'] + .1 and scores['texture TV'] < stated[split]['texture TV'] + .1
    assert spread_ratio(lambda some: generate(some, 1), prompts[:8], 16)[0] > .9 * stated[split]['spread ratio']


def test_captions_are_as_often_true_as_stated(pipe):
    right = {row['measure']: row['percent'] for row in read_record(root / 'papers_results' / 'tiny').metrics['scores'] if row['split'] == 'held_out'}
    assert 100 * image_to_text_scores(pipe, 'held_out', N)['equivalent'] / N > right['caption equivalent'] - 3
