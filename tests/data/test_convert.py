"Sets as people have them become shards: what is kept, what is left out, what is refused, and what a stop leaves."
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from flowtok.data import convert as shards
from flowtok.data.images import captions_of, find_shards, read_samples
from flowtok.files import data_identity
from flowtok import cli
from flowtok.data.convert import _Dropped, ImageEntry, convert_images, folder_entries, _make_sample, _pack_image


def image_file(kind='JPEG', size=(40, 30), mode='RGB', **options):
    "An image file"
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def save(path, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_file() if data is None else data)
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A small COCO, MJHQ and folder, in the current folder"
    monkeypatch.chdir(tmp_path)
    images = []
    for i, split in enumerate(['train', 'restval', 'val', 'test', 'test', 'train', 'test']):
        folder = 'train2014' if split == 'train' else 'val2014'
        name = f'COCO_{folder}_{i:012d}.jpg'
        save(tmp_path / 'coco' / folder / name)
        images.append(dict(cocoid=i, filepath=folder, filename=name, split=split, imgid=i,
                           sentences=[{'raw': f'image {i}, sentence {k}'} for k in range(5)]))
    (tmp_path / 'coco.json').write_text(json.dumps({'images': images, 'dataset': 'coco'}))
    about = {f'{i:x}' * 8: dict(category='food' if i % 2 else 'art', prompt=f'prompt {i}') for i in range(10, 14)}
    for key, facts in about.items(): save(tmp_path / 'mjhq' / facts['category'] / f'{key}.jpg')
    (tmp_path / 'meta.json').write_text(json.dumps(about))
    for i, name in enumerate(['b.png', 'sub/a.JPG', 'c.webp']):
        save(tmp_path / 'mine' / name, image_file(['PNG', 'JPEG', 'WEBP'][i]))
        (tmp_path / 'mine' / name).with_suffix('.txt').write_text(f' caption of {name}\n', encoding='utf-8-sig')
    save(tmp_path / 'mine' / '.hidden' / 'd.png')
    save(tmp_path / 'mine' / '._b.png')
    return tmp_path


def main(words): cli.main(['shards', *words])


def shards_of(*words, processes=1): main([*words, '--processes', str(processes)])


def samples_of(out): return list(read_samples(find_shards(out)))


def contents(out): return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.name != '.lock'}


def fails(capsys, *words):
    "The sentence with which a command ends"
    with pytest.raises(SystemExit) as stop: shards_of(*words)
    sentence = str(stop.value)
    assert sentence.endswith('.') and '\n' not in sentence
    return sentence


# the three sets

def test_coco(here, capsys):
    shards_of('coco', 'coco.json', 'coco', 'out', '--split', 'test', '--samples-per-shard', '2')
    assert capsys.readouterr().out == 'coco-test: 3 of 3 images are in out/*.tar\n'
    with tarfile.open('out/00000.tar') as tar:
        assert tar.getnames() == [f'{i:012d}.{ending}' for i in (3, 4) for ending in ('jpg', 'json', 'txt')]
        assert {(entry.mtime, entry.uid, entry.gid) for entry in tar} == {(0, 0, 0)}
    found = samples_of('out')
    assert found[1]['jpg'] == (here / 'coco/val2014/COCO_val2014_000000000004.jpg').read_bytes()
    said = [f'image 4, sentence {k}' for k in range(5)]
    assert captions_of(found[1]) == said and found[1]['txt'].decode() == said[0]
    assert json.loads(found[1]['json']) == dict(
        key='000000000004', caption=said[0], captions=said, status='success', width=40, height=30, original_width=40,
        original_height=30, cocoid=4, split='test')
    source = json.loads((here / 'out/source.json').read_text())
    assert source['name'] == 'coco-test' and source['counts'] == {'kept': 3} and source['shards'] == 2
    assert source['hash'] == data_identity('', {}, [sample['__key__'] for sample in found])['hash']
    assert json.loads((here / 'out/00001_stats.json').read_text()) == dict(
        count=1, successes=1, bytes=10240, failed_to_download=0, failed_to_resize=0, status_dict={'success': 1}, dropped={})


@pytest.mark.parametrize('split, ids', [('train', [0, 1, 5]), ('restval', [1]), ('val', [2]), ('test', [3, 4, 6]),
                                        ('val2014', [1, 2, 3, 4, 6]), ('train2014', [0, 5])])
def test_splits_of_coco(here, split, ids):
    assert [entry.facts['cocoid'] for entry in shards.coco_entries('coco.json', split)] == ids


def test_mjhq(here):
    shards_of('mjhq', 'meta.json', 'mjhq', 'out', '--size', '20', '--limit', '3')
    facts = [json.loads(sample['json']) for sample in samples_of('out')]
    fields = 'key', 'category', 'caption', 'width', 'original_width'
    assert [tuple(each[field] for field in fields) for each in facts] == [
        ('aaaaaaaa', 'art', 'prompt 10', 27, 40), ('bbbbbbbb', 'food', 'prompt 11', 27, 40),
        ('cccccccc', 'art', 'prompt 12', 27, 40)]


def test_folder_with_texts_beside(here):
    shards_of('folder', 'mine', 'out')
    found = samples_of('out')
    names = ['b.png', 'c.webp', 'sub/a.JPG']
    assert [{'jpg', 'png', 'webp'} & set(sample) for sample in found] == [{'png'}, {'webp'}, {'jpg'}]
    assert [json.loads(sample['json'])['file'] for sample in found] == names
    assert [captions_of(sample) for sample in found] == [[f'caption of {name}'] for name in names]


rows = [('b.png', 'one', 5.5), ('sub/a.JPG', 'two', 4), ('b.png', 'three', 0), ('gone.png', 'four', 1),
        ('c.webp', ' ', 2)]


@pytest.mark.parametrize('ending, image, caption, options', [
    ('csv', 'file_name', 'text', []), ('tsv', 'image', 'caption', []), ('jsonl', 'file', 'prompt', []),
    ('csv', 'where', 'what', ['--image-column', 'where', '--caption-column', 'what'])])
def test_folder_with_a_table(here, capsys, ending, image, caption, options):
    with open(f'table.{ending}', 'w', newline='') as stream:
        if ending == 'jsonl':
            objects = [{image: name, caption: [said], 'score': score} for name, said, score in rows]
            stream.writelines(json.dumps(each) + '\n\n' for each in objects)
        else:
            csv.writer(stream, delimiter=',' if ending == 'csv' else '\t').writerows([(image, caption, 'score'), *rows])
    shards_of('folder', 'mine', 'out', '--captions', f'table.{ending}', *options)
    assert 'left out: missing image 1, missing caption 1' in capsys.readouterr().out
    found = samples_of('out')
    assert [captions_of(sample) for sample in found] == [['one', 'three'], ['two']]
    assert [json.loads(sample['json'])['score'] for sample in found] == [5.5, 4]


def test_texts_become_numbers_only_where_they_are_finite_numbers():
    values = {'5': 5, '-1.5e3': -1500., **{text: text for text in ('007', 'NaN', '1e999', 'true', '', '5 m')}}
    assert {text: shards._number_or_text(text) for text in values} == values and shards._number_or_text(None) is None


# images

@pytest.mark.parametrize('kind, ending', [('JPEG', 'jpg'), ('PNG', 'png'), ('WEBP', 'webp')])
def test_bytes_are_kept_unless_an_image_is_too_large(kind, ending):
    data = image_file(kind)
    for size in (None, 30, 100): assert _pack_image(data, size)[:2] == (ending, data)
    packed = _pack_image(data, 15)
    assert packed[0] == ending and Image.open(io.BytesIO(packed[1])).size == (20, 15)
    assert packed[2] == dict(width=20, height=15, original_width=40, original_height=30)


def test_a_smaller_image_is_upright_and_transparent_still():
    exif = Image.Exif()
    exif[274] = 6                                   # turn by a quarter
    turned = _pack_image(image_file(exif=exif), 15)
    assert Image.open(io.BytesIO(turned[1])).size == (15, 20) and turned[2]['original_height'] == 40
    assert Image.open(io.BytesIO(_pack_image(image_file('PNG', mode='RGBA'), 15)[1])).mode == 'RGBA'
    for mode in ('L', 'CMYK'): assert Image.open(io.BytesIO(_pack_image(image_file(mode=mode), 15)[1])).mode == 'RGB'
    sixteen = io.BytesIO()
    Image.fromarray(np.full((30, 40), 40_000, np.uint16)).save(sixteen, 'PNG')
    assert _pack_image(sixteen.getvalue(), 15)[1] == sixteen.getvalue()


@pytest.mark.parametrize('data, reason', [
    (b'', 'unreadable image'), (b'<html>', 'unreadable image'), (image_file()[:600], 'unreadable image'),
    (image_file('PNG')[:600], 'unreadable image'), (image_file('GIF', mode='P')[:200], 'unreadable image'), (b'<svg></svg>', 'unreadable image')])
def test_broken_images(data, reason):
    with pytest.raises(_Dropped, match=reason): _pack_image(data)


@pytest.mark.parametrize('side', [10_000, 15_000])  # Pillow warns of the first and refuses the second
def test_decompression_bombs(side):
    stream = io.BytesIO()
    Image.new('1', (side, side)).save(stream, 'PNG')
    with pytest.raises(_Dropped): _pack_image(stream.getvalue())


def test_reasons(here):
    for name in ('secret.jpg', 'mine/plain.jpg', 'mine/latin.jpg', 'mine/empty.jpg'): save(here / name)
    (here / 'mine/latin.txt').write_bytes(b'caf\xe9')
    (here / 'mine/empty.txt').write_text(' \n')
    (here / 'mine/folder.jpg').mkdir()

    def reason(file, captions=('yes',), key='1'): return _make_sample(ImageEntry(key, file, captions, {}), here / 'mine')

    for file in ('../secret.jpg', str(here / 'secret.jpg'), 'sub/../../secret.jpg', 'sub/../b.png'):
        assert reason(file) == 'unsafe name'
    for key in ('a.b', '../x', '', 'a/b', 'é'): assert reason('b.png', key=key) == 'unsafe name'
    for file in ('gone.jpg', '', 'folder.jpg', 'x' * 300, 'null\0.jpg'): assert reason(file) == 'missing image'
    assert reason('plain.jpg', None) == reason('empty.jpg', None) == reason('b.png', [None, ' ']) == 'missing caption'
    assert reason('latin.jpg', None) == 'unreadable caption'
    assert captions_of(reason('b.png', ['a \ud83d', 'b'])) == ['a', 'b']


def test_captions_of_several_lines_are_several_captions(here):
    (here / 'mine/b.txt').write_text('a cat\n\n ein Kater \n')
    assert captions_of(_make_sample(ImageEntry('1', 'b.png', None, {}), here / 'mine')) == ['a cat', 'ein Kater']


def test_stamps_have_an_english_line_and_translations(here, capsys):
    "A dozen files laid out as Tux Paint's stamps: an image, and a .txt of which the first line is English."
    for i in range(12):
        (here / f'stamps/kind{i % 3}').mkdir(parents=True, exist_ok=True)
        Image.new('RGBA', (30 + i, 60 - 3 * i), (20 * i, 0, 0, 255)).save(here / f'stamps/kind{i % 3}/{i:02d}.png')
        (here / f'stamps/kind{i % 3}/{i:02d}.txt').write_text(f'A stamp with the number {i}.\nde.utf8=Eine Marke.\nfr.utf8=Un timbre.\n')
    shards_of('folder', 'stamps', 'out', '--first-line', '--fit', 'pad', '--min-side', '30')
    samples = list(read_samples(find_shards(here / 'out')))
    assert len(samples) == 11 and all(captions_of(sample) == [sample['txt'].decode()] and 'stamp with' in sample['txt'].decode() for sample in samples)
    assert all(len(set(Image.open(io.BytesIO(sample['png'])).size)) == 1 for sample in samples)
    assert 'smaller than 30 pixels 1' in capsys.readouterr().out


def test_images_of_any_format_small_ones_long_ones_and_drawings(here):
    folder = here / 'any'
    folder.mkdir()
    for name, size in {'a.gif': (20, 20), 'b.bmp': (20, 20), 'c.tif': (20, 20), 'd.tiff': (20, 20), 'e.png': (40, 20), 'f.jpg': (5, 9)}.items():
        Image.new('RGB', size, 'red').save(folder / name)
    (folder / 'g.svg').write_text('<svg/>')
    for name in 'abcdefg': (folder / f'{name}.txt').write_text(name)
    entries = folder_entries(folder)
    assert [entry.file for entry in entries] == ['a.gif', 'b.bmp', 'c.tif', 'd.tiff', 'e.png', 'f.jpg', 'g.svg']
    for number, (how, counts, size) in enumerate([({}, {'kept': 6, 'not a raster image': 1}, (40, 20)), ({'fit': 'pad'}, {'kept': 6, 'not a raster image': 1}, (40, 40)),
                                                  ({'min_side': 8, 'size': 10}, {'kept': 5, 'not a raster image': 1, 'smaller than 8 pixels': 1}, (20, 10))]):
        source = convert_images('any', entries, folder, here / f'out{number}', **how)
        assert source['counts'] == counts
        samples = {captions_of(sample)[0]: sample for sample in read_samples(find_shards(here / f'out{number}'))}
        assert {ending for sample in samples.values() for ending in sample if not ending.startswith('__')} == {'png', 'jpg', 'txt', 'json'} - ({'jpg'} if 'min_side' in how else set())
        long = Image.open(io.BytesIO(samples['e']['png']))
        assert long.size == size and (np.asarray(long)[0, 0] == (255 if how.get('fit') else (255, 0, 0))).all()
    sizes = _pack_image(image_file('PNG', (40, 20)), 16, 'pad')[2]                # the whole image within 16 pixels
    assert sizes == dict(width=16, height=16, original_width=40, original_height=20)
    for how in ((None, 'crop', 21), (16, 'crop', 21), (16, 'pad', 21)):          # the shorter side as it came
        with pytest.raises(_Dropped): _pack_image(image_file('PNG', (40, 20)), *how)
    with pytest.raises(ValueError, match='fit.*crop.*stretch'):
        convert_images('any', entries, folder, here / 'other', fit='stretch')


def test_what_is_left_out_is_counted_and_told(here, capsys):
    (here / 'coco/val2014/COCO_val2014_000000000003.jpg').unlink()
    save(here / 'coco/val2014/COCO_val2014_000000000004.jpg', b'broken')
    shards_of('coco', 'coco.json', 'coco', 'out', '--split', 'val2014', '--samples-per-shard', '2')
    assert '3 of 5 images' in (told := capsys.readouterr().out)
    assert 'left out: missing image 1, unreadable image 1' in told
    stats = json.loads((here / 'out/00001_stats.json').read_text())
    assert stats['successes'] == 0 and (stats['failed_to_download'], stats['failed_to_resize']) == (1, 1)
    assert stats['dropped']['000000000003'] == dict(reason='missing image',
                                                    file='val2014/COCO_val2014_000000000003.jpg')
    assert [path.name for path in sorted((here / 'out').glob('*.tar'))] == ['00000.tar', '00002.tar']
    before = contents(here / 'out')
    shards_of('coco', 'coco.json', 'coco', 'out', '--split', 'val2014', '--samples-per-shard', '2')
    assert '3 of 3 shards in out are there already' in capsys.readouterr().out and contents(here / 'out') == before


def test_a_set_of_which_nothing_is_left_leaves_nothing(here, capsys):
    for path in (here / 'mjhq').rglob('*.jpg'): path.write_bytes(b'broken')
    sentence = fails(capsys, 'mjhq', 'meta.json', 'mjhq', 'out')
    assert sentence == 'No image of mjhq-30k can be kept: unreadable image 4.'
    assert contents(here / 'out') == {}


# the same bytes, whatever happens

def test_the_number_of_processes_changes_no_byte(here):
    words = ['coco', 'coco.json', 'coco', 'a', '--split', 'val2014', '--samples-per-shard', '2', '--processes', '2']
    done = subprocess.run([sys.executable, '-m', 'flowtok.cli', 'shards', *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and '5 of 5 images' in done.stdout and '5/5' in done.stderr, done.stderr
    shards_of('coco', 'coco.json', 'coco', 'b', '--split', 'val2014', '--samples-per-shard', '2')
    assert contents(here / 'a') == contents(here / 'b')


@pytest.mark.parametrize('where', ['write_atomically', '_make_sample'])
def test_a_stopped_conversion_goes_on(here, monkeypatch, where):
    words = ['coco', 'coco.json', 'coco', 'a', '--split', 'val2014', '--samples-per-shard', '2']
    original, calls = getattr(shards, where), []

    def stops(*arguments, **options):
        calls.append(arguments)
        if len(calls) == (2 if where == 'write_atomically' else 4): raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(shards, where, stops)
    with pytest.raises(SystemExit): shards_of(*words)
    left = {'00000.tar', '00000_stats.json', 'plan.json'} | ({'00001.tar'} if where == 'write_atomically' else set())
    assert set(contents(here / 'a')) == left
    for name in ('.00001.tar-123', '.00001_stats.json-123'): save(here / 'a' / name, b'what a killed conversion leaves')
    before = (here / 'a/00000.tar').stat().st_mtime_ns
    monkeypatch.undo()
    monkeypatch.chdir(here)
    shards_of(*words)
    assert (here / 'a/00000.tar').stat().st_mtime_ns == before
    shards_of(*['b' if word == 'a' else word for word in words])
    assert contents(here / 'a') == contents(here / 'b')


@pytest.mark.parametrize('sent, after', [(signal.SIGKILL, '00000.tar'), (signal.SIGINT, '00000.tar'),
                                         (signal.SIGINT, 'plan.json')])
def test_a_killed_conversion_leaves_no_process_and_goes_on(here, sent, after):
    data = image_file(size=(400, 300))
    for i in range(600):
        save(here / f'many/{i:03d}.jpg', data)
        (here / f'many/{i:03d}.txt').write_text('a caption')
    words = 'folder many a --samples-per-shard 50 --processes'.split()
    run = subprocess.Popen([sys.executable, '-m', 'flowtok.cli', 'shards', *words, '2'], stderr=subprocess.PIPE, text=True,
                           start_new_session=True)
    deadline = time.time() + 60
    while not (here / 'a' / after).exists() and run.poll() is None and time.time() < deadline: time.sleep(.01)
    os.kill(run.pid, sent) if sent == signal.SIGKILL else os.killpg(run.pid, sent)
    try: told = run.communicate(timeout=60)[1]      # ends only when every process has closed its end
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        raise
    assert run.returncode and 'Traceback' not in told and not (here / 'a/source.json').exists()
    main([*words, '1'])
    main(['b' if word == 'a' else word for word in words] + ['1'])
    assert contents(here / 'a') == contents(here / 'b')


# what is refused

faults = {'half.json': b'{"a": ', 'none.json': b'{}', 'other.csv': b'photo,text\nb.png,hello\n', 'taken': b'',
          'bad.jsonl': b'{"file": "b.png"}\n{"file"\n', 'list.jsonl': b'[1, 2]\n', 'empty.csv': b'file,text\n',
          'latin.csv': b'file,text\nb.png,caf\xe9\n'}


@pytest.mark.parametrize('words, named', [
    ('coco coco.json coco out --split dev', 'dev.*coco.json.*restval.*val2014'), ('coco gone.json coco out --split val', 'gone.json'),
    ('coco coco.json gone out --split val', 'gone'), ('coco meta.json coco out --split val', 'meta.json'),
    ('coco coco.json mjhq out --split test', 'mjhq.*3.*coco-test.*mjhq/val2014/COCO_val2014_00'),
    ('coco coco.json coco out --split val --size 0', 'size.*1.*0'), ('coco coco.json coco out --split val --samples-per-shard 0', 'samples_per_shard'),
    ('coco coco.json coco out --split val --limit -1', 'limit.*-1'), ('mjhq coco.json mjhq out', 'coco.json.*meta_data.json'),
    ('mjhq half.json mjhq out', 'half.json'), ('mjhq none.json mjhq out', 'mjhq-30k'), ('folder gone out', 'gone'), ('folder mjhq out', 'mjhq.*4.*.txt.*--captions'),
    ('folder nothing out', 'nothing.*.jpg.*.png'), ('folder mine out --image-column a', '--image-column'), ('folder mine out --captions gone.csv', 'gone.csv'),
    ('folder mine out --captions meta.json', 'meta.json.*.csv.*.jsonl'), ('folder mine out --captions other.csv', "other.csv.*file_name.*--image-column.*'photo', 'text'"),
    ('folder mine out --captions other.csv --image-column photo --caption-column alt', "other.csv.*alt.*--caption-column.*'photo', 'text'"),
    ('folder mine out --captions bad.jsonl', 'bad.jsonl.*1'), ('folder mine out --captions list.jsonl', 'list.jsonl'), ('folder mine out --captions empty.csv', 'empty.csv'),
    ('folder mine out --captions latin.csv', 'latin.csv.*0.*e9'), ('folder mine taken', 'taken'), ('folder mine scenes', 'scenes'),
])
def test_faults_are_one_sentence_before_work_starts(here, capsys, words, named):
    (here / 'nothing').mkdir()
    save(here / 'scenes/00000.tar', b'scenes')
    for name, text in faults.items(): (here / name).write_bytes(text)
    assert re.search(named, fails(capsys, *words.split()))
    assert not (here / 'out').exists()


def test_keys_are_unique(here):
    entries = shards.folder_entries('mine')
    with pytest.raises(ValueError, match='000000000.*2'):
        convert_images('mine', [entries[0], *entries], 'mine', 'out')


def test_another_set_or_option_needs_another_folder(here, capsys):
    shards_of('mjhq', 'meta.json', 'mjhq', 'out')
    before = contents(here / 'out')
    for words in ('coco coco.json coco out --split val', 'mjhq meta.json mjhq out --size 9',
                  'mjhq meta.json mjhq out --limit 2'):
        assert fails(capsys, *words.split()).endswith('choose another folder.')
    assert contents(here / 'out') == before


# the command line

def test_help_names_every_option(capsys):
    for command in ('coco', 'mjhq', 'folder'):
        with pytest.raises(SystemExit) as stop: main([command, '--help'])
        told = capsys.readouterr().out
        assert stop.value.code == 0
        assert all(option in told for option in ('--size', '--samples-per-shard', '--limit', '--processes', 'OUT'))
    assert '--image-column' in told
    with pytest.raises(SystemExit) as stop: main(['flickr'])
    assert stop.value.code == 2
