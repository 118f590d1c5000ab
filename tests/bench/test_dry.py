"""`make gpu DRY=1`: every part gets to its first use of a GPU here, and a part that is broken does not."""

import sys

import pytest
import torch

from bench import dry, gpu
from kernel_surgery.common.errors import UserError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the parts themselves run")


def commands(tmp_path):
    """{part: (module, options)} of the parts that are not tests."""
    every = {part.name: gpu.dry_command(part)[3:] for part in gpu.parts(tmp_path / "out")}
    return {name: (words[0], words[1:]) for name, words in every.items() if words[0].startswith(("bench", "kernel_"))}


def test_every_part_that_is_no_test_gets_to_its_first_use_of_a_gpu_and_writes_nothing(tmp_path):
    assert {part.name for part in gpu.parts(tmp_path)} - commands(tmp_path).keys() == {"kernels", "models"}
    for name, (module, words) in commands(tmp_path).items():
        where = dry.reach(module, words)
        print(f"{name}: {where}")
        assert where.startswith(("bench/", "kernel_surgery/"))
    assert not list(tmp_path.iterdir()) and not torch.cuda.is_available()


def test_a_part_with_a_wrong_option_is_broken(tmp_path):
    for name, (module, words) in commands(tmp_path).items():
        with pytest.raises(SystemExit) as left:
            dry.reach(module, [*words, "--no-such-option"])
        assert left.value.code == 2, name


@pytest.mark.parametrize(
    ("part", "gone"),
    [
        ("memcheck", "kernel_surgery.kernels.project"),  # imported in a function, before the first use
        ("op", "kernel_surgery.ops.eager"),  # and after it
        ("model", "bench.shapes"),
        ("vllm", "kernel_surgery.engines.variants"),
    ],
)
def test_a_part_whose_import_is_gone_is_broken(tmp_path, monkeypatch, part, gone):
    monkeypatch.setitem(sys.modules, gone, None)
    with pytest.raises(ImportError, match=gone.rpartition(".")[2]):
        dry.reach(*commands(tmp_path)[part])


def test_a_part_that_imports_a_name_that_is_gone_is_broken(tmp_path, monkeypatch):
    monkeypatch.delattr("kernel_surgery.engines.variants.variants")
    with pytest.raises(ImportError, match="variants"):
        dry.reach(*commands(tmp_path)["vllm"])


def test_a_run_that_uses_no_gpu_or_fails_before_it_is_broken(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "idle.py").write_text("def run(words):\n    return 0\n")
    with pytest.raises(UserError, match="idle ended with status 0 and did not use the GPU"):
        dry.reach("idle", [])
    (tmp_path / "wrong.py").write_text("def run(words):\n    raise ValueError('shapes')\n")
    with pytest.raises(ValueError, match="shapes"):
        dry.reach("wrong", [])


@pytest.mark.slow
def test_the_dry_run_of_the_tests_and_of_a_benchmark_succeeds(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    names = ["kernels", "memcheck", "models"]
    assert gpu.run(["--dry", "--parts", ",".join(names)]) == 0
    said = capsys.readouterr().out
    assert all(f"{name}: ok; " in said for name in names) and f"{len(names)} of {len(names)} parts ok" in said
    assert not list(tmp_path.iterdir())


def test_a_dry_run_is_red_if_one_part_is_broken(tmp_path, capsys):
    (tmp_path / "test_broken.py").write_text("import kernel_surgery.nothing\n")
    (tmp_path / "test_right.py").write_text("import pytest\n\n@pytest.mark.gpu\ndef test_it():\n    pass\n")
    pytest_words = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-m", "gpu"]
    broken = gpu.Part("broken", 9, 1, [*pytest_words, str(tmp_path / "test_broken.py")])
    right = gpu.Part("right", 9, 1, [*pytest_words, str(tmp_path / "test_right.py")], ("a_tool",))
    assert gpu.run_dry([right], tmp_path) == 0
    assert "right: ok; 1 test collected" in (said := capsys.readouterr().out)
    assert "(here: a_tool is not installed here)" in said and "1 of 1 parts ok. Nothing was run on a GPU." in said
    assert gpu.run_dry([broken, right], tmp_path) == 1
    said = capsys.readouterr().out
    assert "broken: broken; " in said and "No module named 'kernel_surgery.nothing'" in said
    assert "right: ok; " in said and "1 of 2 parts ok" in said


def test_a_dry_run_says_if_there_is_no_place_for_results(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: cannot be written to \(Not a directory\). Nothing was run."):
        gpu.run_dry([], tmp_path / "file" / "results")
