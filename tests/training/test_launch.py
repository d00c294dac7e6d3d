"What a person sees of a training that a notebook starts."
import IPython.display

from flowtok.toy.shapes import write_shards
from flowtok.training.launch import watch
from flowtok.training.tasks import plan


def test_the_last_line_under_the_curves_is_that_of_the_last_step(tmp_path, monkeypatch):
    shown = []

    class Screen:
        def __init__(self): shown.append([])

        def update(self, what, **options): shown[self.number].append(what)

    def display(what, **options):
        screen = Screen()
        screen.number = len(shown) - 1
        return screen

    monkeypatch.setattr(IPython.display, 'display', display)
    write_shards(tmp_path / 'scenes', 'train', 16)
    events, = watch(plan('text', 'tiny', tmp_path / 'scenes', tmp_path / 'out', steps=5, batch_size=4))
    curves, lines = shown
    assert all(curve.data[:4] == b'\x89PNG' for curve in curves) and curves                  # bytes, whatever shows figures in this kernel
    texts = [line['text/plain'] for line in lines]
    assert any('3 of 5' in text for text in texts) and '5 of 5' in texts[-1] and 'seconds left' not in texts[-1]
    assert [event['step'] for event in events if 'loss' in event] == [1, 2, 3, 4, 5]
