from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from training_ready.moe.families import MoEError
from training_ready.moe.monitor import LoadSnapshot, layer_load
from training_ready.moe.plots import plot_expert_load, plot_load_over_steps


def snapshot(counts):
    rows = torch.as_tensor(counts)
    return LoadSnapshot(
        phase="eval", tokens=int(rows[0].sum()), layers=[layer_load(n, row) for n, row in enumerate(rows)]
    )


def near(picture, colour):
    """Share of pixels within a small distance of an RGB colour."""
    return float((np.abs(picture[..., :3] - np.array(colour)).max(axis=-1) < 0.02).mean())


def cell_colours(picture):
    return {tuple(np.round(pixel, 2)) for pixel in picture[60:-60:7, 60:-120:7, :3].reshape(-1, 3)}


def test_heat_map_shows_an_overload_and_stays_pale_when_even(tmp_path):
    even = imread(plot_expert_load(snapshot(np.full((2, 4), 100)), tmp_path / "even.png"))
    skewed = imread(plot_expert_load(snapshot([[100] * 4, [370, 10, 10, 10]]), tmp_path / "skewed.png"))
    assert near(even, (0.967, 0.968, 0.968)) > 0.3, "an even load is drawn in the neutral colour"
    assert len(cell_colours(skewed)) > len(cell_colours(even))


@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (1, 2), (4, 4), (32, 8), (48, 128), (61, 256)])
def test_heat_maps_of_every_size_are_readable_files(layers, experts, tmp_path):
    counts = torch.randint(0, 50, (layers, experts), generator=torch.Generator().manual_seed(0))
    picture = imread(plot_expert_load(snapshot(counts), tmp_path / "deep" / "load.png", title="run · step 5"))
    height, width = picture.shape[:2]
    assert 200 < height <= 1300
    assert 400 < width <= 1500


def test_course_of_a_run_and_of_a_single_step(tmp_path):
    history = [(step, snapshot([[50 + step, 50, 50, 50 - step], [50] * 4])) for step in range(0, 50, 10)]
    for name, points in (("run.png", history), ("one.png", history[:1])):
        path = plot_load_over_steps(points, tmp_path / name)
        assert imread(path).std() > 0.01


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(MoEError, match="history is empty"):
        plot_load_over_steps([], tmp_path / "run.png")
    with pytest.raises(MoEError, match="without layers"):
        plot_expert_load(LoadSnapshot(phase="train", tokens=0, layers=[]), tmp_path / "load.png")


def test_pyplot_is_never_imported(tmp_path):
    import subprocess

    code = "import sys, training_ready.moe.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
