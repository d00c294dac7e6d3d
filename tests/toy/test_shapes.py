"Scenes: what a seed means, what captions say, what the reader refuses, and shards that stop and go on."
import hashlib
import json
import math
import random
import tarfile
import warnings
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from flowtok.config import WORDS
from flowtok.toy import verifier as reader
from flowtok.toy import shapes as scenes
from flowtok.toy.verifier import Claims, agrees, is_true, parse, read, shows
from flowtok.toy.shapes import (COLOURS, COLUMNS, HELD_OUT, ROWS, SHAPES, SIZES, SPLITS, Scene, Thing, captions,
                            draw_scene, is_at, _place_words, plain_caption, relation, render, texture_pattern, write_shards)

red_star = Thing('star', 'red', 'large', SIZES['large'], .2, (.9, .1, .1))


def on_white(*things): return Scene(things, 'white', 'plain', .87)


# drawing

@pytest.mark.parametrize('split, things, ground, texts, colour', [
    ('train', [('bar', 'cyan', 'small')], ('black', 'plain'),
     ['a cyan bar bottom left', 'a cyan bar on plain'], (33.2, 42.2, 42.9)),
    ('seen', [('circle', 'pink', 'small'), ('star', 'orange', 'small')], ('grey', 'plain'),
     ['a pink circle middle centre, an orange star bottom right',
      'an orange star bottom right, a pink circle middle centre'], (133.3, 120.6, 122.7)),
    ('held_out', [('cross', 'red', 'small')], ('black', 'plain'),
     ['a red cross top right', 'a red cross'], (47., 36.5, 36.5))])
def test_a_seed_keeps_its_meaning(split, things, ground, texts, colour):
    "Weights and records were made with these scenes: who changes them raises VERSION."
    scene = draw_scene(77, split)
    assert [(o.shape, o.colour, o.size) for o in scene.things] == things and (scene.tone, scene.texture) == ground
    assert captions(scene, 77, split=split)[::4] == texts
    assert np.allclose(render(scene).mean((0, 1)), colour, atol=.1)
    assert scenes._VERSION == 4


def test_captions_keep_their_words():
    "As above, for the captions of three hundred scenes."
    texts = [text for split in SPLITS for seed in range(100)
             for text in captions(draw_scene(seed, split), seed, split=split)]
    assert hashlib.sha256('\n'.join(texts).encode()).hexdigest()[:16] == 'ef9390ad069bc10c'
    assert scenes._VERSION == 4


@pytest.mark.parametrize('split', SPLITS)
def test_scenes_keep_their_rules(split):
    for seed in range(150):
        things = draw_scene(seed, split).things
        pairs = {(o.shape, o.colour) for o in things}
        alike = len(things) == 2 and len(pairs) == 1
        assert (alike or len(pairs) == len(things) <= 3) and bool(pairs & HELD_OUT) == (split == 'held_out')
        for i, a in enumerate(things):
            reach = a.radius * scenes._REACH[a.shape]
            assert reach < min(a.x, a.y, 1 - a.x, 1 - a.y)
            assert all(min(abs(v - middle) for middle in scenes.MIDDLES) <= scenes._STRAY for v in (a.x, a.y))
            assert abs(a.radius / SIZES[a.size] - 1) <= .05 and abs(a.angle) <= scenes._TILT
            assert all(math.hypot(a.x - b.x, a.y - b.y) > reach + b.radius * scenes._REACH[b.shape] for b in things[:i])


def test_things_can_lie_anywhere():
    "As many scenes as asked for; no place along an axis is never drawn; and the reader reads them as it reads the others."
    def stray(o): return max(min(abs(v - middle) for middle in scenes.MIDDLES) for v in (o.x, o.y))

    drawn = [draw_scene(seed, anywhere=.5).things for seed in range(600)]
    assert .45 < np.mean([all(stray(o) <= scenes._STRAY + 1e-9 for o in things) for things in drawn]) < .65
    every = [draw_scene(seed, 'held_out', anywhere=1.) for seed in range(1000)]
    for axis in 'xy':
        counts, _ = np.histogram([getattr(o, axis) for scene in every for o in scene.things], 25, (.2, .8))
        assert counts.min() >= 10
    assert np.mean([shows(render(scene), captions(scene, i, split='held_out')[i % 5]) for i, scene in enumerate(every[:400])]) >= .995
    with pytest.raises(ValueError, match='0.*1'):
        draw_scene(0, anywhere=2.)


@pytest.mark.parametrize('size', [16, 64, 100, 256])
def test_images_have_the_size_asked_for(size):
    image = render(draw_scene(1), size)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8


@pytest.mark.parametrize('seed', range(6))
def test_large_images_are_the_small_ones_in_detail(seed):
    large = render(draw_scene(seed), 256).reshape(64, 4, 64, 4, 3).mean((1, 3))
    difference = np.abs(large - render(draw_scene(seed), 64))
    assert difference.mean() < 1.5 and np.percentile(difference, 95) < 10


@pytest.mark.parametrize('shape', SHAPES)
def test_areas_are_what_the_reader_believes(shape):
    a, _ = scenes._coverage(replace(red_star, shape=shape, radius=.3), 512)
    assert a.sum() / 512**2 / .3**2 == pytest.approx(reader._AREA[shape], rel=.01)


@pytest.mark.parametrize('shape', SHAPES)
def test_shapes_reach_as_far_as_they_say(shape):
    angle = np.linspace(0, 2 * math.pi, 3600)
    around = np.stack([np.cos(angle), np.sin(angle)], -1)
    assert scenes.shape_distance(shape, around * scenes._REACH[shape] * 1.002).min() > 0


@pytest.mark.parametrize('texture', scenes.TEXTURES[1:])
def test_textures_have_four_periods(texture):
    pattern = texture_pattern(texture, 64)
    assert np.allclose(pattern, np.roll(pattern, (16, 16), (0, 1))) and .2 < pattern.mean() < .55


@pytest.mark.parametrize('call, named', [
    (lambda: draw_scene(-1), 'seed.*-1'),
    (lambda: draw_scene(1.5), 'seed.*1.5'),
    (lambda: draw_scene(0, 'val'), 'val.*held_out'),
    (lambda: captions(draw_scene(0), 0, split='val'), 'val'),
    (lambda: render(draw_scene(0), 8), 'size.*16.*8'),
])
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named): call()


# places

@pytest.mark.parametrize('x, y, words', [
    (.2, .2, ('top', 'left')), (.5, .2, ('top', 'centre')), (.8, .2, ('top', 'right')), (.2, .5, ('middle', 'left')),
    (.5, .5, ('middle', 'centre')), (.8, .5, ('middle', 'right')), (.2, .8, ('bottom', 'left')),
    (.5, .8, ('bottom', 'centre')), (.8, .8, ('bottom', 'right')), (.41, .59, ('middle', 'centre'))])
def test_places_have_two_words(x, y, words):
    assert _place_words(replace(red_star, x=x, y=y)) == words


@pytest.mark.parametrize('x, columns', [(.35, 'left'), (.37, 'left centre'), (.43, 'left centre'), (.45, 'centre'),
                                        (.55, 'centre'), (.57, 'centre right'), (.63, 'centre right'), (.65, 'right')])
def test_near_a_cut_both_places_are_accepted(x, columns):
    across, down = replace(red_star, x=x, y=.2), replace(red_star, x=.2, y=x)
    assert [word for word in COLUMNS if is_at(across, ('top', word))] == columns.split()
    rows = [ROWS[COLUMNS.index(word)] for word in columns.split()]
    assert [word for word in ROWS if is_at(down, (word, 'left'))] == rows
    assert not is_at(across, ('bottom', 'left')) and not is_at(down, ('top', 'right'))


def test_where_a_thing_is_said_to_be_it_is():
    for x, y in np.random.default_rng(0).uniform(size=(300, 2)):
        thing = replace(red_star, x=x, y=y)
        assert is_at(thing, _place_words(thing))
        assert sum(is_at(thing, (row, column)) for row in ROWS for column in COLUMNS) in (1, 2, 4)


# captions

def test_the_vocabulary_of_the_small_model_is_that_of_the_captions():
    named = (*ROWS, *COLUMNS, *SIZES, *COLOURS, *SHAPES, *scenes.TONES, *scenes.TEXTURES, 'two', *map(scenes.plural, SHAPES))
    assert WORDS[-len(named):] == named


@pytest.mark.parametrize('split', SPLITS)
def test_captions_are_short_true_and_made_of_words(split):
    for seed in range(150):
        scene = draw_scene(seed, split)
        for text in captions(scene, seed, split=split):
            words = text.replace(',', '').split()
            assert set(words) <= set(WORDS) and len(words) <= 15
            assert is_true(text, scene), text


@pytest.mark.parametrize('split', SPLITS)
def test_the_first_caption_is_the_plain_one_in_reading_order(split):
    for seed in range(150):
        scene = draw_scene(seed, split)
        text = captions(scene, seed, split=split)[0]
        things = sorted(scene.things, key=lambda o: (round(3 * o.y - .5), round(3 * o.x - .5)))
        assert parse(text).things == tuple((None, o.colour, o.shape, _place_words(o)) for o in things)
        assert parse(text).relation is None and parse(text).ground is None and text.count(', ') == len(things) - 1
        assert text == plain_caption(scene) == plain_caption(replace(scene, things=scene.things[::-1]))
        assert captions(scene, seed, 1, split) == [text] and is_true(text, scene)


def test_loose_captions_name_what_plain_ones_do_not():
    claims = [parse(text) for seed in range(300) for text in captions(draw_scene(seed), seed)[1:]]
    assert {c.relation for c in claims} == {None, *scenes.RELATIONS}
    assert {c.ground for c in claims} == {None, *scenes.TONES, *scenes.TEXTURES}
    for i, names in enumerate((SIZES, COLOURS, SHAPES)):
        assert {thing[i] for c in claims for thing in c.things} == {None, *names}
    assert {thing[3] is None for c in claims for thing in c.things} == {True, False}


def test_a_relation_is_said_of_pairs_that_face_each_other():
    said = 0
    for seed in range(300):
        scene = draw_scene(seed)
        if any(parse(text).relation for text in captions(scene, seed)):
            a, b = scene.things
            assert scenes.facing(a, b) and relation(a, b) and max(abs(a.x + b.x - 1), abs(a.y + b.y - 1)) < .15
            said += 1
    assert said > 15 and not scenes.facing(red_star, replace(red_star, x=.2))


def test_textures_are_light_on_every_tone():
    found = [draw_scene(seed) for seed in range(300)]
    assert {scene.tone for scene in found if scene.contrast > 0} == set(scenes.TONES)
    assert all((scene.contrast > 0) == (scene.texture != 'plain') for scene in found)


def test_held_out_pairs_are_named_in_full():
    for seed in range(150):
        pairs = {(o.shape, o.colour) for o in draw_scene(seed, 'held_out').things} & HELD_OUT
        for text in captions(draw_scene(seed, 'held_out'), seed, split='held_out'):
            assert all(f'{colour} {shape}' in text for shape, colour in pairs)


def test_an_stands_before_orange_only():
    texts = [text.replace(',', '').split() for seed in range(300) for text in captions(draw_scene(seed), seed)]
    pairs = {pair for words in texts for pair in zip(words, words[1:])}
    assert {word for article, word in pairs if article == 'an'} == {'orange'} and ('a', 'orange') not in pairs


def test_more_captions_begin_with_the_same_ones():
    assert captions(draw_scene(5), 5, n=9)[:5] == captions(draw_scene(5), 5)


def test_parse_takes_captions_and_nothing_else():
    rng, texts = random.Random(0), [text for seed in range(100) for text in captions(draw_scene(seed), seed)]
    assert all(parse(text) for text in texts) and parse('  A  Red\nstar ') == parse('a red star')
    assert parse('small red star left of ring') == parse('a small red star left of a ring')
    assert parse('a coloured star') == parse('coloured star') == parse('star')
    assert parse('a shape shape') == parse('a shape, a shape')
    for text in ['', 'a', 'a red', 'small', 'coloured', 'coloured red star', 'red coloured star', 'a star on', 'a star on red',
                 'a red small star', 'a star and', 'a star on white on white', 'there is',
                 'a star and a ring with a star', 'a star and a ring and a star and a ring', 'a a star',
                 'a star, a ring, a bar, a bar', 'two star', 'two stars and a ring', 'three stars', 'a stars', 'a star left top', 'a star centre centre', 'a top left star',
                 'a star top left bottom right', 'a star on a white background a', ',']:
        assert parse(text) is None, text
    for text in texts:  # one word less is another caption or none, never an accident
        words = text.split()
        del words[rng.randrange(len(words))]
        parse(' '.join(words))


@pytest.mark.parametrize('typed, meant', [
    ('A picture of a BIG gray-free star!', None), ('a big red star in the middle', 'a large red star middle centre'), ('blue star', 'a blue star'),
    ('two little red disks', None), ('two little red circles', 'two small red circles'), ('a red ring in the upper left corner', 'a red ring top left'),
    ('an image of a green cross on gray', 'a green cross on grey'), ('the star at the top', 'a star top'), ('a donut on the left', 'a ring left'),
    ('a red star to the left of a blue ring', 'a red star left of a blue ring'), ('a bar with a checkered background', 'a bar on a checked background')])
def test_prompts_mean_what_people_type(typed, meant):
    assert parse(typed) == (parse(meant) if meant else None) and (meant is None or parse(meant) is not None)


def test_two_of_a_kind_and_places_in_part():
    two = Claims((('large', 'green', 'circle', None),) * 2, None, 'black')
    assert parse('two large green circles on black') == two
    assert parse('a star top').things[0][3] == ('top', None) and parse('a star left').things[0][3] == (None, 'left')
    scene = on_white(replace(red_star, x=.2, y=.2), replace(red_star, x=.8, y=.8))
    assert is_true('two red stars', scene) and is_true('a red star and a red star', scene) and not is_true('two blue stars', scene)
    assert is_true('a red star left, a red star right', scene) and not is_true('a red star left, a red star left', scene)


def test_captions_have_the_forms_that_people_type():
    texts = [text for seed in range(600) for text in captions(draw_scene(seed), seed)]
    forms = {'no place': lambda t: not set(t.split()) & {*ROWS, *COLUMNS, 'above', 'below'}, 'no article': lambda t: t.split()[0] in COLOURS,
             'counted': lambda t: t.startswith('two '), 'there is': lambda t: t.startswith('there is'), 'a size': lambda t: bool(set(t.split()) & set(SIZES))}
    assert all(sum(map(found, texts)) > .01 * len(texts) for found in forms.values())


def test_commas_do_not_matter():
    for text in [text for seed in range(100) for text in captions(draw_scene(seed), seed)]:
        assert parse(text) == parse(text.replace(',', '')) == parse(text.replace(' ', ' , '))


def test_statements_are_true_or_not():
    blue_ring = replace(red_star, shape='ring', colour='blue', size='small', x=.2, y=.45)
    scene = replace(on_white(red_star, blue_ring), texture='dotted')
    for text in ['a star and a ring', 'a ring with a star', 'a blue ring left of a red star', 'a shape and a shape',
                 'a large red star right of a small blue ring on a dotted background', 'a star and a ring on white',
                 'a blue ring middle left, a red star middle centre', 'a red star, a blue ring middle left',
                 'a shape middle centre and a shape middle left', 'a star middle centre with a shape on dotted']:
        assert is_true(text, scene), text
    for text in ['a star', 'a star and a ring and a shape', 'a ring right of a star', 'a ring above a star',
                 'a blue star and a red ring', 'a small star and a ring', 'a star and a ring on black',
                 'a star and a ring on plain', 'a star and a star', '',
                 'a blue ring middle centre, a red star middle left', 'a blue ring top left, a red star middle centre',
                 'a star middle left and a shape middle left', 'a blue ring middle left']:
        assert not is_true(text, scene), text


def test_what_may_be_said_is_accepted():
    rng = np.random.default_rng(0)
    for x, y, u, v in rng.uniform(size=(300, 4)):
        a, b = replace(red_star, x=x, y=y), replace(red_star, x=u, y=v)
        assert set(relation(a, b)) <= set(relation(a, b, clear=False)) and len(relation(a, b)) <= 1


# reading

@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize('size', [64, 100, 256])
def test_images_show_their_captions_and_no_others(split, size):
    seeds = range(5_000, 5_040)
    texts = [captions(draw_scene(seed, split), seed, split=split) for seed in seeds]
    readings = [read(render(draw_scene(seed, split), size)) for seed in seeds]
    right = [agrees(parse(text), *reading) for five, reading in zip(texts, readings) for text in five]
    others = [agrees(parse(text), *reading) for five, reading in zip(texts[1:], readings) for text in five]
    assert np.mean(right) >= .995 and np.mean(others) < .03


def test_reading_is_repeatable_and_takes_pil_images(tmp_path):
    image = render(draw_scene(8), 128)
    pil = Image.fromarray(image)
    assert read(image) == read(image.copy()) == read(pil) == read(pil.convert('RGBA'))
    pil.save(tmp_path / 'a.jpg', quality=95)
    assert shows(Image.open(tmp_path / 'a.jpg'), captions(draw_scene(8), 8)[0])


@pytest.mark.parametrize('image', [
    *(np.zeros(shape, np.uint8) for shape in [(64, 64), (3, 64, 64), (64, 80, 3), (32, 32, 3), (64, 64, 4)]),
    np.zeros((64, 64, 3)), Image.new('RGB', (64, 65)), [[1]], None])
def test_what_is_no_image_is_refused(image):
    with pytest.raises(ValueError): read(image)


vague = ['a shape', 'a shape and a shape', 'a shape and a shape and a shape', *(f'a {shape}' for shape in SHAPES),
         *(f'a {colour} shape' for colour in COLOURS), *(f'a {size} shape' for size in SIZES)]


def never_right(image): return not any(agrees(parse(text), *read(image)) for text in vague)


@pytest.mark.parametrize('seed', range(8))
def test_noise_is_never_right(seed):
    assert never_right(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize('level', [0, 128, 255])
def test_blank_is_never_right(level): assert never_right(np.full((64, 64, 3), level, np.uint8))


@pytest.mark.parametrize('shape, distances', [  # in radii; two circles further apart are a bar to the reader
    ('circle', (1.15, 1.25)), ('bar', (1.5, 1.7, 2., 2.5)),
    *((shape, (1., 1.3, 1.45, 1.7, 2., 2.15)) for shape in ('triangle', 'star', 'cross', 'ring'))])
def test_touching_things_are_never_right(shape, distances):
    for apart in distances:
        a, b = (replace(red_star, shape=shape, x=.5 + side * apart / 2 * red_star.radius) for side in (-1, 1))
        assert never_right(render(on_white(a, b)))


@pytest.mark.parametrize('shape', ['triangle', 'star', 'cross', 'ring'])  # half a circle is a bar to the reader
def test_half_a_thing_is_never_right(shape):
    image = render(on_white(replace(red_star, shape=shape)))
    image[:, 32:] = render(on_white())[:, 32:]
    assert never_right(image)


def test_drawn_things_stay_far_below_the_allowed_error():
    errors = [o.error for split in SPLITS for seed in range(60) for o in read(render(draw_scene(seed, split))).things]
    assert max(errors) < .16 < .3 == reader._MAX_ERROR


def test_colours_that_cancel_are_unclear_without_a_warning():
    image, chroma = np.full((64, 64, 3), 128, np.uint8), np.zeros((64, 64, 3))
    image[20:40, 20:30], image[20:40, 30:40] = (200, 30, 30), (30, 200, 200)
    chroma[20:40, 20:30], chroma[20:40, 30:40] = (.4, -.2, -.2), (-.4, .2, .2)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert never_right(image)
        assert [o.shape for o in read(image).things] == ['unclear']
        assert reader._read_thing(chroma, chroma.any(-1)).shape == 'unclear'  # nothing is left of them


def test_one_thing_more_or_less_or_elsewhere_is_wrong():
    ring = replace(red_star, shape='ring', colour='blue', rgb=(.1, .2, .9), size='small', radius=SIZES['small'], x=.2)
    star, text = replace(red_star, x=.62), 'a large red star right of a small blue ring'
    assert shows(render(on_white(star, ring)), text)
    for things in [(star,), (star, ring, replace(ring, y=.84)), (replace(star, x=.3), replace(ring, x=.8)),
                   (star, replace(ring, rgb=(.1, .9, .2))), (replace(star, x=.7), replace(ring, radius=SIZES['large'])),
                   (star, replace(ring, shape='circle'))]:
        assert not shows(render(on_white(*things)), text)


# shards

def names(path):
    with tarfile.open(path) as tar: return tar.getnames()


def test_shards_have_the_layout_of_img2dataset(tmp_path):
    shards = write_shards(tmp_path, 'held_out', 5, size=80, samples_per_shard=2, image_format='jpg', start=998)
    assert [path.name for path in shards] == ['00000.tar', '00001.tar', '00002.tar']
    assert names(shards[1]) == ['000001000.jpg', '000001000.json', '000001000.txt',
                                '000001001.jpg', '000001001.json', '000001001.txt']
    with tarfile.open(shards[1]) as tar:
        assert {(entry.mtime, entry.uid) for entry in tar} == {(0, 0)}
        facts = json.load(tar.extractfile('000001001.json'))
        text = tar.extractfile('000001001.txt').read().decode()
        image = Image.open(tar.extractfile('000001001.jpg'))
        assert image.size == (80, 80) and shows(image, text)
    assert facts['captions'] == captions(draw_scene(1001, 'held_out'), 1001, split='held_out')
    assert facts['caption'] == text == facts['captions'][0] and facts['key'] == '000001001' and facts['seed'] == 1001
    assert facts['width'] == facts['original_height'] == 80 and facts['status'] == 'success'
    assert json.loads((tmp_path / 'scenes.json').read_text()) == {
        'n': 5, 'start': 998, 'samples_per_shard': 2, 'version': scenes._VERSION, 'split': 'held_out', 'size': 80,
        'image_format': 'jpg', 'anywhere': 0.}


def test_shards_are_the_same_bytes_everywhere(tmp_path):
    a, b = (write_shards(tmp_path / name, 'train', 4) for name in 'ab')
    assert a[0].read_bytes() == b[0].read_bytes()


def test_a_stopped_run_leaves_no_half_shard_and_goes_on(tmp_path, monkeypatch):
    def stops(seed, **rest):
        if seed == 5: raise KeyboardInterrupt
        return scenes_sample(seed, **rest)

    scenes_sample = scenes._shard_sample
    monkeypatch.setattr(scenes, '_shard_sample', stops)
    with pytest.raises(KeyboardInterrupt): write_shards(tmp_path, 'train', 6, samples_per_shard=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['00000.tar', '00001.tar', 'scenes.json']
    before = (tmp_path / '00000.tar').stat().st_mtime_ns
    monkeypatch.undo()
    shards = write_shards(tmp_path, 'train', 6, samples_per_shard=2)
    assert [len(names(path)) for path in shards] == [6, 6, 6]
    assert (tmp_path / '00000.tar').stat().st_mtime_ns == before


def test_a_complete_folder_is_only_read(tmp_path, monkeypatch):
    write_shards(tmp_path, 'train', 2)
    monkeypatch.setattr(scenes, 'write_shard', None)
    assert write_shards(tmp_path, 'train', 2) == [tmp_path / '00000.tar']


def test_other_contents_are_left_alone(tmp_path):
    write_shards(tmp_path / 'a', 'train', 2)
    for other in (dict(n=3), dict(n=2, size=32), dict(n=2, start=1), dict(n=2, image_format='jpg')):
        with pytest.raises(ValueError): write_shards(tmp_path / 'a', 'train', **other)
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b' / '00000.tar').write_bytes(b'photographs')
    with pytest.raises(ValueError): write_shards(tmp_path / 'b', 'train', 2)
    assert (tmp_path / 'b' / '00000.tar').read_bytes() == b'photographs'


@pytest.mark.parametrize('arguments, named', [
    (dict(split='val', n=2), 'val.*held_out'),
    (dict(split='train', n=0), 'n must.*0'),
    (dict(split='train', n=2.5), 'n must.*2.5'),
    (dict(split='train', n=2, size=4), 'size.*16.*4'),
    (dict(split='train', n=2, start=-1), '-1'),
    (dict(split='train', n=2, samples_per_shard=0), 'samples_per_shard.*0'),
    (dict(split='train', n=2, image_format='gif'), 'gif.*png.*jpg'),
])
def test_bad_sets_are_refused_before_a_folder_is_made(tmp_path, arguments, named):
    with pytest.raises(ValueError, match=named): write_shards(tmp_path / 'new', **arguments)
    assert not (tmp_path / 'new').exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError): write_shards(tmp_path / 'file', 'train', 2)
