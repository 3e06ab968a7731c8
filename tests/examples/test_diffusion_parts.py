"""The sampler, the images and the positions of ``examples/diffusion``: no model is trained."""

import gzip
import io
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from examples.diffusion.flow import noised, sample
from examples.diffusion.images import Images, NoisedImages, load, split
from megatron_dynmoe.settings.messages.refusals import FlagError


def gaussian(means: torch.Tensor, std: float):
    """The velocity of flow matching for images ~ N(means[class], std ** 2), in closed form.

    With x_t = (1 - t) z + t y, of variance s_t ** 2 = (1 - t) ** 2 + t ** 2 std ** 2,
    E[y - z | x_t = x] = m + (t std ** 2 - (1 - t)) / s_t ** 2 * (x - t m).
    """

    def velocity(x, time, classes):
        mean, t = means[classes].view(-1, 1, 1, 1), time.view(-1, 1, 1, 1)
        variance = (1 - t) ** 2 + (t * std) ** 2
        return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)

    return velocity


MEANS = torch.tensor([-1.0, 0.5, 0.0], dtype=torch.float64)  # the last: no class


def test_the_sampler_follows_a_closed_form_velocity() -> None:
    """The flow carries noise z to mean + std * z, exactly; Euler's error falls as 1 / steps."""
    noise = torch.randn(64, 1, 2, 2, dtype=torch.float64)
    classes = torch.arange(64) % 2
    exact = MEANS[classes].view(-1, 1, 1, 1) + 0.3 * noise
    errors = {
        steps: (sample(gaussian(MEANS, 0.3), noise, classes, steps=steps) - exact).abs().max()
        for steps in (100, 200, 400)
    }
    assert errors[400] < 0.01
    assert errors[100] / errors[200] == pytest.approx(2, rel=0.1)
    assert errors[200] / errors[400] == pytest.approx(2, rel=0.1)


def test_guidance_goes_beyond_the_class() -> None:
    """With point masses, v = (m - x) / (1 - t) is linear in m, so guided samples end at the
    guided mean, 0 + guidance * (m - 0)."""
    noise, classes = torch.randn(8, 1, 2, 2, dtype=torch.float64), torch.arange(8) % 2
    ended = sample(gaussian(MEANS, 0.0), noise, classes, steps=10, guidance=3.0, null_class=2)
    torch.testing.assert_close(ended, 3 * MEANS[classes].view(-1, 1, 1, 1).expand_as(ended))
    with pytest.raises(ValueError, match=r"guidance is 3\.0: give null_class"):
        sample(gaussian(MEANS, 0.0), noise, classes, steps=1, guidance=3.0)


def test_the_line_begins_at_noise_and_ends_at_the_image() -> None:
    image, noise = torch.randn(2, 3, 1, 4, 4)
    x, velocity = noised(image, noise, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(x[0], noise[0]) and torch.equal(x[1], image[1])
    torch.testing.assert_close(x[2] + 0.75 * velocity[2], image[2])


def test_samples_depend_on_their_index_alone() -> None:
    pytest.importorskip("sklearn")
    digits = load("digits")
    assert digits.pixels.shape == (1797, 1, 8, 8) and digits.pixels.max() == 255
    train, held_out = split(digits, 0.05, seed=1)
    assert sorted(torch.cat([train, held_out]).tolist()) == list(range(1797))
    data, again = (NoisedImages(digits, train, 10_000, 1, class_dropout=0.25) for _ in range(2))
    for index in (5000, 3, 5000):
        for name, value in data[index].items():
            assert torch.equal(value, again[index][name])
    samples = [data[index] for index in range(len(train))]
    # An epoch has each image once; a quarter of the labels are left out.
    images = torch.stack([s["x"] + (1 - s["time"]) * s["velocity"] for s in samples])
    pixels = torch.sort(((images + 1) * 127.5).round().sum(dim=(1, 2, 3))).values
    expected = torch.sort(digits.pixels[train].sum(dim=(1, 2, 3)).float()).values
    assert torch.equal(pixels, expected)
    dropped = np.mean([int(s["label"]) == 10 for s in samples])
    assert abs(dropped - 0.25) < 5 * math.sqrt(0.25 * 0.75 / len(samples))


def test_every_source_of_images(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 8, 3), dtype=np.uint8)
    labels = np.array([0, 0, 0, 1, 1, 1])
    np.savez(tmp_path / "some.npz", images=pixels, labels=labels)
    for number, label in enumerate(labels):
        folder = tmp_path / "tree" / f"class_{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[number]).save(folder / f"{number}.png")
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    for source, names in (("some.npz", ["0", "1"]), ("tree", ["class_0", "class_1"])):
        found = load(str(tmp_path / source))
        assert torch.equal(found.pixels, expected) and found.labels.tolist() == labels.tolist()
        assert found.names == names


def of_files(folder: Path, *files: Image.Image | bytes | None, name: str = "a") -> str:
    """A folder of images with one folder for each of two classes, the second of which is plain."""
    for number in range(2):
        (folder / "b").mkdir(parents=True, exist_ok=True)
        Image.new("L", (6, 4), 10 * number).save(folder / "b" / f"{number}.png")
    (folder / name).mkdir()
    for number, file in enumerate(files):
        path = folder / name / f"{number}.png"
        path.write_bytes(file) if isinstance(file, bytes) else file.save(path)
    return str(folder)


def test_images_of_one_folder_become_gray_or_rgb(tmp_path) -> None:
    gray, clear = Image.new("L", (6, 4), 90), Image.new("LA", (6, 4), (90, 0))
    found = load(of_files(tmp_path / "gray", gray, clear, gray.convert("1"))).pixels
    assert found.shape == (5, 1, 4, 6)
    assert found[:, 0, 0, 0].tolist() == [90, 255, 0, 0, 10]  # what is transparent is white
    few = Image.new("P", (6, 4))
    few.putpalette([7, 8, 9])
    half = Image.new("RGBA", (6, 4), (200, 100, 0, 255))
    half.putpixel((5, 3), (1, 2, 3, 0))
    found = load(of_files(tmp_path / "colors", few, half, gray)).pixels
    assert found.shape == (5, 3, 4, 6)
    assert found[:3, :, 0, 0].tolist() == [[7, 8, 9], [200, 100, 0], [90, 90, 90]]
    assert found[1, :, 3, 5].tolist() == [255, 255, 255]


def damaged() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6), dtype=np.uint8)).save(
        file, "PNG"
    )
    return file.getvalue()[:60]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([Image.new("I;16", (6, 4))], r"a/0\.png is of Pillow's mode I;16, not of 8 bits for each"),
        (
            [Image.new("L", (6, 4)), Image.new("L", (4, 4))],
            r"a/1\.png has \[4, 4\] pixels, and the",
        ),
        ([damaged()], r"a/0\.png cannot be read: "),
        ([b"text"], r"a/0\.png cannot be read: cannot identify image file"),
        ([], r"/a holds no PNG or JPEG files"),
    ],
    ids=["16 bits", "another size", "damaged", "no image", "an empty class"],
)
def test_files_that_cannot_be_learned_are_named(tmp_path, files: list, message: str) -> None:
    with pytest.raises(FlagError, match=message):
        load(of_files(tmp_path, *files))


IMAGES, LABELS = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"images": np.zeros((4, 8, 8, 2), np.uint8)},
            r"uint8 \[4, 8, 8, 2\], not .*C = 1 \(gray\)",
        ),
        (
            {"images": np.zeros((4, 3, 8, 8), np.uint8)},
            r"uint8 \[4, 3, 8, 8\], not uint8 \[N, H, W",
        ),
        ({"images": IMAGES.astype(np.uint16)}, r"images are uint16 \[4, 8, 8, 1\], not uint8"),
        ({"images": IMAGES / 255}, r"images are float64 "),
        ({"images": IMAGES[:3], "labels": LABELS[:3]}, "there are 3 images, and 4 are the fewest"),
        ({"labels": LABELS[:3]}, r"labels are int64 \[3\] of 4 images"),
        ({"labels": LABELS / 2}, r"labels are float64 "),
        ({"labels": LABELS + 1}, "labels are of 2 classes from 1 to 2, not numbered 0, 1, 2"),
        ({"labels": LABELS * 10**9}, "labels are of 2 classes from 0 to 1000000000, not numbered"),
        ({"labels": LABELS - 1}, "labels are of 2 classes from -1 to 0, not numbered"),
        ({"images": np.array([None] * 4)}, "Object arrays cannot be loaded"),
    ],
)
def test_arrays_that_cannot_be_learned_are_refused(tmp_path, arrays, message: str) -> None:
    np.savez(tmp_path / "some.npz", **{"images": IMAGES, "labels": LABELS} | arrays)
    with pytest.raises(FlagError, match=message):
        load(str(tmp_path / "some.npz"))


def test_a_source_that_cannot_be_read_is_refused(tmp_path) -> None:
    np.savez(tmp_path / "short.npz", images=IMAGES, labels=LABELS)
    content = (tmp_path / "short.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(content[:-40])
    (tmp_path / "text.npz").write_text("text")
    np.savez(tmp_path / "other.npz", pixels=IMAGES)
    (tmp_path / "empty").mkdir()
    (tmp_path / "idx").mkdir()
    packed = gzip.compress(np.array([2051, 4, 8, 8], ">u4").tobytes() + IMAGES.tobytes())
    (tmp_path / "idx" / "train-images-idx3-ubyte.gz").write_bytes(packed[:-12])
    for source, message in (
        *(("none", "No such file"), ("none.npz", "No such file")),
        ("short.npz", "not a zip file"),
        ("text.npz", "allow_pickle"),
        ("other.npz", "images is not a file in the archive"),
        ("empty", "it holds no folders, of which each would be a class"),
        ("idx", "ended before"),
    ):
        with pytest.raises(FlagError, match=message):
            load(str(tmp_path / source))


def test_two_images_or_more_are_held_out_and_learned() -> None:
    for number, fraction, expected in ((4, 0.05, 2), (4, 0.9, 2), (100, 0.05, 5), (100, 0.9, 90)):
        few = Images(torch.zeros(number, 1, 2, 2), torch.zeros(number, dtype=torch.int64), ["0"])
        learned, held_out = split(few, fraction, seed=1)
        assert len(held_out) == expected
        assert sorted([*learned.tolist(), *held_out.tolist()]) == list(range(number))


@pytest.mark.megatron
def test_patches_and_positions() -> None:
    from examples.diffusion.model import DiT, positions_2d

    fake = SimpleNamespace(model_config=SimpleNamespace(patch_size=2, image_shape=(3, 4, 6)))
    x = torch.randn(2, 3, 4, 6)
    patches = DiT._cut(fake, x)
    assert patches.shape == (2, 6, 12)
    # Row by row: the fourth patch is the first of the second row.
    assert torch.equal(patches[:, 3], x[:, :, 2:, :2].flatten(1))
    assert torch.equal(DiT._paste(fake, patches), x)
    positions = positions_2d(2, 3, 8)
    assert len({tuple(row.tolist()) for row in positions}) == 6
    assert torch.equal(positions[0, :4], positions[2, :4])  # of one row
    assert torch.equal(positions[0, 4:], positions[3, 4:])  # of one column


@pytest.mark.megatron
def test_the_average_is_an_exponential_mean() -> None:
    from examples.diffusion.model import DiT

    class Model(torch.nn.BatchNorm1d):  # has parameters and buffers
        model_config = SimpleNamespace(average_decay=0.5)

    model = Model(3)
    average = torch.nn.BatchNorm1d(3).requires_grad_(False)
    model.average = (average,)
    expected = torch.ones(3)
    for step in range(12):
        with torch.no_grad():
            model.weight.copy_(torch.randn(3))
            model.running_mean.copy_(torch.randn(3))
        DiT.follow(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
        torch.testing.assert_close(average.weight, expected)
        assert torch.equal(average.running_mean, model.running_mean)


@pytest.mark.megatron
def test_the_frechet_distance_of_normal_distributions() -> None:
    """Against the closed form if covariances commute, and SciPy's matrix root if they do not."""
    linalg = pytest.importorskip("scipy.linalg")
    from examples.diffusion.measure import frechet_distance

    draw = torch.Generator().manual_seed(1)
    x = torch.randn(500, 6, generator=draw, dtype=torch.float64)
    x = x - x.mean(dim=0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # covariance exactly 1
    m, n, s, t = torch.rand(4, 6, generator=draw, dtype=torch.float64)
    s[5] = 0  # a feature that is always the same
    exact = ((m - n) ** 2 + (s - t) ** 2).sum().item()
    assert frechet_distance(m + s * white, n + t * white) == pytest.approx(exact, abs=1e-7)
    assert frechet_distance((m + s * white).float(), m + s * white) == pytest.approx(0, abs=1e-5)
    mixes = torch.randn(2, 6, 6, generator=draw, dtype=torch.float64)
    a, b = (mix @ mix.T for mix in mixes)
    root = linalg.sqrtm((a @ b).numpy()).real
    exact = ((m - n) ** 2).sum() + (a + b - 2 * torch.from_numpy(root)).trace()
    measured = frechet_distance(m + white @ mixes[0].T, n + white @ mixes[1].T)
    assert measured == pytest.approx(exact.item(), rel=1e-9)


@pytest.mark.megatron
def test_the_classifier_knows_digits(monkeypatch) -> None:
    pytest.importorskip("sklearn")
    from examples.diffusion import measure
    from examples.diffusion.images import scaled

    monkeypatch.setattr(measure, "CLASSIFIER_STEPS", 120)
    digits = load("digits")
    train, held_out = split(digits, 0.2, seed=1)
    state = torch.get_rng_state()
    one, again = (
        measure.classifier_of(digits.pixels[train], digits.labels[train], 10, "cpu")
        for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), state)  # what is sampled later does not change
    assert torch.equal(one.head.weight, again.head.weight)
    with torch.no_grad():
        found = one(scaled(digits.pixels[held_out])).argmax(dim=1)
    assert (found == digits.labels[held_out]).double().mean() > 0.9


@pytest.mark.megatron
def test_a_run_is_measured_by_its_first_command_without_layout_and_steps(tmp_path) -> None:
    from examples.diffusion.measure import flags_of
    from megatron_dynmoe.settings.messages.command_line import UsageError

    with pytest.raises(UsageError, match=r"holds no command\.txt: give the --run-dir"):
        flags_of(tmp_path, [])
    (tmp_path / "sizes.flags").write_text(
        "--num-layers 2\n--pipeline-model-parallel-size 2\n--decoder-first-pipeline-num-layers 1\n"
    )
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("4")
    (tmp_path / "command.txt").write_text(
        f"torchrun --nproc-per-node 4 -m examples.diffusion.train @{tmp_path}/sizes.flags "
        "--images 'my images' --tensor-model-parallel-size 2 --sequence-parallel --seed 7 "
        f"--load elsewhere --ckpt-step 3 --finetune --run-dir {tmp_path}\nanother -m x --seed 8\n"
    )
    flags = flags_of(tmp_path, ["--seed", "9"])
    assert flags[:6] == ["--num-layers", "2", "--images", "my images", "--seed", "7"]
    assert flags[6:8] == ["--load", str(tmp_path / "checkpoints")] and flags[-2:] == ["--seed", "9"]
    assert not {"--finetune", "--ckpt-step", "--sequence-parallel", "--run-dir"} & set(flags)
