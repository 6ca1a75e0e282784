"Writes are all or nothing; picture and array files keep what was put in; bytes do not change from run to run."

import os
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from facelab.lab.arrays import read_npz, read_safetensors, require, safetensors_metadata, write_safetensors
from facelab.lab.errors import InputError, ShapeError, UnsafeFileError
from facelab.lab.files import atomic_write, check_file, read_csv, read_json, read_text, read_yaml, safe_join, write_json
from facelab.lab.images import contact_sheet, read_image, resize, write_image

WRITER = """
import os, signal, sys, time
from facelab.lab.files import atomic_write

def write_for_ever(path):
    step = 0
    while True:
        step += 1
        with atomic_write(path, "wb") as file:
            for part in range(64):
                file.write(bytes([step % 251]) * 4096)

path = sys.argv[1]
for trial in range(20):
    child = os.fork()
    if child == 0:
        write_for_ever(path)
    while trial == 0 and not os.path.exists(path):
        time.sleep(0.001)
    time.sleep(0.001 + 0.0037 * trial)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    data = open(path, "rb").read()
    assert len(data) == 64 * 4096 and len(set(data)) == 1, f"trial {trial}: {len(data)} bytes of {len(set(data))} versions"
drafts = [name for name in os.listdir(os.path.dirname(path)) if name != os.path.basename(path)]
print(len(drafts), all(name.startswith(".") and name.endswith(".part") for name in drafts))
"""


def test_a_kill_leaves_a_whole_file(tmp_path):
    "Twenty writers are killed at odd moments; what is under the name is always one whole version, and their drafts are hidden files."
    done = subprocess.run([sys.executable, "-c", WRITER, str(tmp_path / "weights.bin")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    drafts, hidden = done.stdout.split()
    assert int(drafts) > 0 and hidden == "True", "no writer was killed while it wrote: the test shows nothing"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, {"n": 1})
    with pytest.raises(InputError, match="/b/1"):
        write_json(path, {"a": 1, "b": [0.0, float("inf")]})
    with pytest.raises(InputError, match="object"):
        write_json(path, {"a": object()})
    with pytest.raises(InputError, match="keys"):
        write_json(path, {1: "a", "1": "b"})
    assert read_json(path) == {"n": 1} and os.listdir(tmp_path) == ["record.json"]


def test_new_files_have_ordinary_permissions(tmp_path):
    "A file made through a temporary one must not be private to its maker."
    plain = tmp_path / "plain"
    plain.write_text("")
    with atomic_write(tmp_path / "deep" / "a.txt") as file:
        file.write("a\nb\n")
    made = tmp_path / "deep" / "a.txt"
    assert stat.S_IMODE(made.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode) and made.read_bytes() == b"a\nb\n"


def test_a_link_is_replaced_not_followed(tmp_path):
    "Writing over a link (as dvc makes them into its cache) leaves the file behind it alone."
    (tmp_path / "cached").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "cached")
    write_json(tmp_path / "link", [1])
    assert (tmp_path / "cached").read_text() == "kept" and not (tmp_path / "link").is_symlink()


def test_json_floats_survive_exactly(tmp_path):
    values = [0.1, 1e-300, 1 / 3, np.float64(2) ** 0.5, 12345678901234567890]
    write_json(tmp_path / "a.json", values)
    assert read_json(tmp_path / "a.json") == values


def test_yaml_reads_what_papermill_reads(tmp_path):
    "The strict reader agrees with plain YAML on every value that it accepts."
    yaml = pytest.importorskip("yaml")
    text = "lr: 1.0e-4\nsteps: 300\nname: mini\nflag: true\nnone: null\nsizes: [1, 2.5, a]\nquoted: '1e-4'\nnested: {a: {b: [1]}}\n"
    (tmp_path / "a.yaml").write_text(text)
    assert read_yaml(tmp_path / "a.yaml") == yaml.safe_load(text)


def test_safe_join_keeps_inside(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "dots..png").write_text("")
    (tmp_path / "secret").write_text("s")
    (tmp_path / "in" / "sly").symlink_to(tmp_path / "secret")
    assert safe_join(tmp_path / "in", "dots..png").exists() and not safe_join(tmp_path / "in", "new/name.png").exists()
    for name in ("../secret", "sly", "/etc/passwd", "a/../../secret", "..\\secret", "\\\\host\\share", "c:x", "a\0b", ""):
        with pytest.raises(UnsafeFileError):
            safe_join(tmp_path / "in", name)
    with pytest.raises(InputError):
        safe_join(tmp_path / "in", "x" * 5000)
    (tmp_path / "outer").symlink_to(tmp_path / "in")  # the folder itself may be a link
    assert safe_join(tmp_path / "outer", "dots..png").exists()


def test_check_file_never_waits(tmp_path):
    "A named pipe without a writer would block an open for ever."
    os.mkfifo(tmp_path / "pipe")
    began = time.monotonic()
    for path in (tmp_path / "pipe", "/dev/zero"):
        for read in (check_file, read_text, read_image, read_npz, read_json):
            with pytest.raises(InputError, match="pipe, socket or device"):
                read(path)
    assert time.monotonic() - began < 5


def test_text_line_ends_and_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
    assert read_text(tmp_path / "a.txt") == "a\nb\nc\n"
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfid,x\r\n1,2\r\n")
    assert list(read_csv(tmp_path / "a.csv", ["id"]).id) == [1]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    assert (read_image(tmp_path / "deep.png")[..., 0].ravel() == np.arange(256)).all()
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "deep.tif")
    assert (read_image(tmp_path / "deep.tif")[..., 0].ravel() == np.arange(256)).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(mode):
    "The same grey card in every mode that Pillow can hold in a TIFF, PNG or JPEG."
    import io

    card = Image.new("L", (6, 4), 255).convert("RGB")
    image = Image.fromarray(np.full((4, 6), 65535, np.uint16)) if mode == "I;16" else (card.convert("LA") if mode == "PA" else card).convert(mode)
    held = io.BytesIO()
    image.save(held, "TIFF" if mode in ("CMYK", "YCbCr", "PA", "I;16") else "PNG")
    read = read_image(held.getvalue())
    assert read.shape == (4, 6, 3) and read.dtype == np.uint8 and (read == 255).all()


def test_transparency_is_white(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    assert read_image(tmp_path / "p.png").tolist() == [[[255, 255, 255], [0, 0, 255]]]
    half = Image.fromarray(np.uint8([[[0, 0, 0, 128]]]))
    half.save(tmp_path / "half.png")
    assert read_image(tmp_path / "half.png")[0, 0, 0] == 127


@pytest.mark.parametrize("note", range(1, 9))
def test_exif_turns_every_way(tmp_path, note):
    "All eight EXIF orientations give the upright picture."
    upright = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)
    stored = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, 1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: np.rot90(a, -1)}[note](upright)
    exif = Image.Exif()
    exif[0x0112] = note
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    assert (read_image(tmp_path / "a.png") == upright).all()


def test_pictures_are_the_same_bytes_twice(tmp_path):
    image = np.random.default_rng(1).integers(0, 256, (40, 30, 3), np.uint8)
    for suffix in (".png", ".jpg"):
        write_image(tmp_path / f"a{suffix}", image)
        write_image(tmp_path / f"b{suffix}", np.asfortranarray(image))
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    assert (read_image(tmp_path / "a.png") == image).all()
    with pytest.raises(ShapeError):
        write_image(tmp_path / "c.png", image.astype(np.float32))
    with pytest.raises(InputError):
        write_image(tmp_path / "c.txt", image)
    assert not list(tmp_path.glob("c.*"))


def test_resize_is_the_mean_or_pillows_bicubic():
    image = np.random.default_rng(2).integers(0, 256, (12, 8, 3), np.uint8)
    mean = image.reshape(3, 4, 4, 2, 3).mean((1, 3))
    assert np.abs(resize(image, (3, 4)) - mean).max() <= 1  # Pillow rounds after each of the two axes
    assert (resize(image, (12, 8), "bicubic") == image).all()
    assert (resize(image, (6, 4), "bicubic") == np.asarray(Image.fromarray(image).resize((4, 6), Image.Resampling.BICUBIC))).all()


def test_contact_sheet_places_in_reading_order():
    cells = [np.full((4, 4, 3), value, np.uint8) for value in range(5)]
    sheet = contact_sheet(cells, columns=3, pad=1)
    assert sheet.shape == (11, 16, 3) and [sheet[2 + 5 * (i // 3), 2 + 5 * (i % 3), 0] for i in range(5)] == list(range(5))


def test_safetensors_bytes_do_not_change(tmp_path):
    "The library writes metadata in the order of a hash map that changes from process to process; ours is fixed."
    code = "import sys, torch; from facelab.lab.arrays import write_safetensors; write_safetensors(sys.argv[1], {n: torch.full((3,), float(i)) for i, n in enumerate('bca')}, {k: k for k in 'qwertyuiop'})"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there.safetensors")], check=True, env=os.environ | {"PYTHONHASHSEED": "1"})
    write_safetensors(tmp_path / "here.safetensors", {n: torch.full((3,), float(i)) for i, n in reversed([*enumerate("bca")])}, {k: k for k in "poiuytrewq"})
    assert (tmp_path / "there.safetensors").read_bytes() == (tmp_path / "here.safetensors").read_bytes()


def test_safetensors_is_what_the_library_reads(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    tensors = {name: torch.randn(3, 4).to(dtype) for name, dtype in {"a": torch.float32, "b": torch.float16, "c": torch.bfloat16, "d": torch.float64}.items()}
    tensors |= {"view": torch.arange(12).reshape(3, 4).T, "scalar": torch.tensor(3), "bool": torch.tensor([True, False]), "empty": torch.zeros(0, 5), "grad": torch.ones(2, requires_grad=True), "odd": torch.ones(3, dtype=torch.int8)}
    write_safetensors(tmp_path / "a.safetensors", tensors, {"ü": "ö"})
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert set(file.keys()) == set(tensors) and file.metadata() == {"ü": "ö"}
        assert all(torch.equal(file.get_tensor(name), value) and file.get_tensor(name).dtype == value.dtype for name, value in tensors.items())
    ours = read_safetensors(tmp_path / "a.safetensors")
    assert all(torch.equal(ours[name], value) for name, value in tensors.items()) and safetensors_metadata(tmp_path / "a.safetensors") == {"ü": "ö"}


def test_require_names_the_axis():
    arrays = {"mean": np.zeros((5, 3), np.float32), "basis": torch.zeros(6, 3, 2)}
    with pytest.raises(ShapeError, match=r"basis: shape \(6, 3, 2\).*v = 5"):
        require(arrays, "a.npz", {"mean": ("v", 3, float), "basis": ("v", 3, "k", float)})
    with pytest.raises(ShapeError, match="1 of 36 values are NaN"):
        arrays["basis"][5, 2, 1] = float("nan")
        require(arrays, "a.npz", {"basis": ("v", 3, "k", float)})
    assert require({"a": {"b": np.ones(4)}}, "a.h5", {"a/b": ("n", bool)}) == {"n": 4}
