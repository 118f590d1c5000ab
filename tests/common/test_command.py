"""The command line: one clear line, the right exit status, nothing loaded too early, nothing half-written."""

import ast
import json
import os
import pty
import shutil
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from kernel_surgery import __main__ as listing
from kernel_surgery import __version__
from kernel_surgery.common import environment
from kernel_surgery.common.command import RESUMES, Parser, main
from kernel_surgery.common.environment import _git_state, environment_record
from kernel_surgery.common.errors import (
    CheckpointError,
    KernelSurgeryError,
    MismatchError,
    ModelError,
    SubspaceError,
    UserError,
)
from kernel_surgery.common.files import write_atomic
from kernel_surgery.common.names import DTYPES
from kernel_surgery.common.progress import progress
from kernel_surgery.models.load import load_model, load_tokenizer, parse_device, parse_dtype, resolve_model
from kernel_surgery.problems.generator import parse_languages, problems

ROOT = Path(__file__).resolve().parents[2]


def outcome(run, capsys, argv=None):
    """(exit status, stdout, stderr) of a stage run in this process."""
    with pytest.raises(SystemExit) as left:
        main(run, argv)
    return (left.value.code, *capsys.readouterr())


def raising(error):
    def run(argv=None):
        raise error

    return run


# -- exit status and messages


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (1, 1)])
def test_the_status_is_what_the_stage_returns(capsys, returned, status):
    assert outcome(lambda argv: returned, capsys) == (status, "", "")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("no such layer: 40"), "error: no such layer: 40\n"),
        (
            UserError("cannot bake.\n  model: x\nNo weight was changed."),
            "error: cannot bake.\n  model: x\nNo",
        ),
        (
            FileNotFoundError(2, "No such file or directory", "a.npz"),
            "error: cannot open 'a.npz': No such file",
        ),
        (IsADirectoryError(21, "Is a directory", "out"), "error: cannot open 'out': Is a directory\n"),
    ],
)
def test_bad_input_is_said_without_a_traceback(capsys, error, message):
    status, out, err = outcome(raising(error), capsys)
    assert status == 2 and out == ""
    assert err.startswith(message) and "Traceback" not in err


@pytest.mark.parametrize("kind", [UserError, ModelError, SubspaceError, MismatchError, CheckpointError])
def test_an_error_of_the_package_is_bad_input(kind, capsys):
    assert issubclass(kind, KernelSurgeryError) and issubclass(kind, ValueError)
    status, out, err = outcome(raising(kind("what is wrong")), capsys)
    assert (status, out, err) == (2, "", "error: what is wrong\n")


def test_the_library_raises_errors_of_the_package():
    with pytest.raises(KernelSurgeryError, match=r"^unknown split 'no such split'"):
        problems("no such split")


@pytest.mark.parametrize("error", [ValueError("from somewhere else"), TypeError("a bug"), RuntimeError("a bug")])
def test_a_bug_keeps_its_traceback(error):
    """A ValueError of torch or of the interpreter is not known to be about the input."""
    with pytest.raises(type(error), match=str(error)):
        main(raising(error))


def test_the_traceback_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("KERNEL_SURGERY_TRACEBACK", "1")
    with pytest.raises(UserError, match="no such layer"):
        main(raising(UserError("no such layer")))


def test_ctrl_c_is_130(capsys):
    status, out, err = outcome(raising(KeyboardInterrupt()), capsys)
    assert (status, out) == (130, "") and err == f"interrupted: nothing is left half written. {RESUMES}\n"


def test_a_closed_pipe_is_quiet():
    code = (
        "from kernel_surgery.common.command import main\n"
        "def run(argv=None):\n    for i in range(100000): print(i)\nmain(run)\n"
    )
    stage = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert stage.stdout.readline() == b"0\n"
    stage.stdout.close()
    err = stage.stderr.read()
    stage.stderr.close()
    assert (stage.wait(), err) == (141, b"")


# -- options


def parser():
    parser = Parser("eval", description="Evaluate.")
    parser.add_argument("--mode", choices=["original", "fused"], required=True)
    parser.add_argument("--languages", type=parse_languages, default="en,zh")
    return parser


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mode", "vanilla"], "error: argument --mode: invalid choice: 'vanilla'"),
        ([], "error: the following arguments are required: --mode"),
        (["--mode", "fused", "--wibble"], "error: unrecognized arguments: --wibble"),
        (["--mode", "fused", "--lang", "en"], "error: unrecognized arguments: --lang; did you mean --languages?"),
        (["--mod=fused", "--no-such"], "error: unrecognized arguments: --mod; did you mean --mode?"),
        (["--mode", "fused", "--", "--subspce"], "error: unrecognized arguments: -- --subspce"),
        (
            ["--mode", "fused", "--languages", "en,tlh"],
            "error: argument --languages: unknown language 'tlh': choose from zh, en, es, ar, ja, ko, sw, or all.",
        ),
    ],
)
def test_bad_usage_is_one_line_and_status_2(capsys, argv, message):
    status, out, err = outcome(lambda argv: parser().parse_args(argv) and None, capsys, argv)
    assert status == 2 and out == ""
    assert err.startswith(message)
    assert err.count("\n") == 1 and err.endswith("(see python -m kernel_surgery.eval --help)\n")


def test_languages():
    assert parse_languages("en,zh") == ("en", "zh")
    assert parse_languages(" zh, en ,zh") == ("zh", "en")
    assert parse_languages("all") == ("zh", "en", "es", "ar", "ja", "ko", "sw")
    for text in ("", ",", "EN", "en;zh"):
        with pytest.raises(UserError, match="unknown language"):
            parse_languages(text)


def test_devices_and_dtypes():
    import torch

    assert parse_device("cpu") == torch.device("cpu")
    assert parse_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="unknown device 'gpu': choose from auto, cpu, cuda, cuda:N"):
        parse_device("gpu")
    with pytest.raises(UserError, match=r"no device 'cuda:99': this machine has \d+ CUDA devices"):
        parse_device("cuda:99")
    assert parse_dtype("bfloat16") is torch.bfloat16
    assert parse_dtype("auto") is torch.float32
    assert parse_dtype("auto", "cuda") is torch.bfloat16
    with pytest.raises(UserError, match="unknown dtype 'int8': choose from auto, float32, bfloat16, float16"):
        parse_dtype("int8")


# -- every stage


def stages() -> list[str]:
    """Modules that are run with `python -m`: those that have an `if __name__ == "__main__"`."""
    found = []
    for path in sorted(environment.PACKAGE.rglob("*.py")):
        parts = path.relative_to(environment.PACKAGE.parent).with_suffix("").parts
        tests = [node.test for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.If)]
        if any("__main__" in ast.unparse(test) for test in tests) and not {"kernels", "__main__"} & {*parts}:
            found.append(".".join(parts))
    return found


def test_the_promised_stages_are_there():
    assert {f"kernel_surgery.{stage}" for stage in ("collect", "fit", "eval")} <= set(stages())


@pytest.mark.parametrize("stage", stages())
def test_help_answers_at_once_and_bad_usage_in_one_line(stage):
    """Under two seconds by the clock, and without torch, whose import alone takes longer on a slow disk."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", stage, "--help"], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    print(f"{stage} --help: {seconds:.2f} s")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert f"usage: python -m {stage}" in done.stdout
    assert seconds < 2

    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", stage, "--no-such-option"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    lines = done.stderr.splitlines()
    said = [line for line in lines if not line.startswith("import time:")]
    modules = {line.rpartition("|")[2].strip() for line in lines}
    assert done.returncode == 2 and len(said) == 1 and said[0].startswith("error: "), said
    assert not modules & {"torch", "transformers", "triton", "matplotlib", "scipy"}


def test_the_version_can_be_asked_for(capsys):
    assert outcome(listing.run, capsys, ["--version"]) == (0, f"kernel-surgery {__version__}\n", "")


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_without_a_command_the_commands_are_listed(words, capsys):
    assert outcome(lambda argv: listing.run(words), capsys) == (0, listing.listing() + "\n", "")
    named = [line.split()[0] for line in listing.listing().splitlines() if line.startswith("  ")]
    assert {f"kernel_surgery.{name}" for name in named} == {s for s in stages() if s.count(".") == 1}


def test_the_console_script_runs_a_command_and_names_itself(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/kernel-surgery", "fit", "--help"])
    status, out, err = outcome(listing.run, capsys)
    assert status == 0 and out.startswith("usage: kernel-surgery fit ") and err == ""
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/kernel-surgery", "fitt"])
    status, out, err = outcome(listing.run, capsys)
    assert (status, out, err) == (2, "", "error: unknown command 'fitt'; did you mean fit?\n")
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/kernel-surgery", "magic"])
    assert outcome(listing.run, capsys)[2].startswith("error: unknown command 'magic': choose from collect, fit, ")


def test_the_console_script_shares_the_work_of_the_commands_that_do(monkeypatch):
    own = {
        name
        for name in listing.COMMANDS
        if "main(run, shared=True)" in (ROOT / "kernel_surgery" / f"{name}.py").read_text(encoding="utf-8")
    }
    assert own == set(listing.SHARED)
    asked = []
    monkeypatch.setattr(listing, "main", lambda run, *, shared: asked.append(shared))
    for name in ("probe", "bake"):
        monkeypatch.setattr(sys, "argv", ["kernel-surgery", name])
        listing.script()
    assert asked == [True, False]


@pytest.mark.parametrize(
    ("name", "meant"), [("smolm2", "; did you mean smollm2?"), ("poliglot", "; did you mean polyglot?"), ("x", ".")]
)
def test_a_misspelt_model_is_named(name, meant):
    with pytest.raises(UserError) as raised:
        resolve_model(name)
    assert f"there is no such folder{meant} Give " in str(raised.value)


# -- models by name


def model_folder(path: Path, *files: str) -> Path:
    path.mkdir(parents=True)
    for file in files:
        (path / file).write_text("{}")
    return path


def test_a_model_folder_is_taken_as_it_is(tmp_path):
    whole = model_folder(tmp_path / "m", "config.json", "model.safetensors")
    assert resolve_model(str(whole)) == str(whole)


@pytest.mark.parametrize("org", ["", "org/"])
def test_a_folder_comes_before_the_hub(tmp_path, monkeypatch, org):
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / f"{org}m", "config.json", "model.safetensors")
    assert resolve_model(f"{org}m") == f"{org}m"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no model at 'nowhere': there is no such folder"),
        ("./no/where", "no model at './no/where': there is no such folder"),
        ("here/missing", "no model at 'here/missing': there is no such folder"),
        ("a/b/c", "no model at 'a/b/c': there is no such folder"),
        ("", "no model at '': there is no such folder"),
        ("file", "model 'file' is a file. Give the folder"),
        ("here", "model 'here' has no config.json, so it is not a model folder"),
        ("weightless", "model 'weightless' has no weights. It needs model.safetensors, or an index and its shards"),
        ("pickled", r"has only pickled weights \(pytorch_model.bin\), which are never loaded"),
        ("sharded", "model 'sharded' is incomplete: 1 of 2 weight files missing \\(first: b.safetensors\\)"),
        ("garbled", "model 'garbled': 'model.safetensors.index.json' is not a safetensors index"),
        ("org/absent", "model 'org/absent' is not in the local cache, and HF_HUB_OFFLINE is set"),
    ],
)
def test_a_model_that_is_not_there_is_one_clear_error(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    model_folder(tmp_path / "here")
    model_folder(tmp_path / "weightless", "config.json")
    model_folder(tmp_path / "pickled", "config.json", "pytorch_model.bin")
    sharded = model_folder(tmp_path / "sharded", "config.json", "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    model_folder(tmp_path / "garbled", "config.json", "model.safetensors.index.json")
    with pytest.raises(KernelSurgeryError, match=message):
        resolve_model(name)


def test_the_hub_is_asked_once_and_not_for_long(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    unreachable = HfHubHTTPError.__bases__[0]
    asked = []

    def model_info(self, name, timeout=None):
        asked.append((name, timeout))
        if name == "org/unreachable":
            raise unreachable("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    assert resolve_model("org/there") == "org/there"
    with pytest.raises(UserError, match=r"the hub did not answer \(\[Errno -2\] Name or service not known\)"):
        resolve_model("org/unreachable")
    assert asked == [("org/there", 5.0), ("org/unreachable", 5.0)]


def test_what_the_cache_holds_is_used_when_the_hub_is_out_of_reach(tmp_path, monkeypatch):
    import huggingface_hub

    snapshot = model_folder(tmp_path / "snapshots" / "0123", "config.json", "model.safetensors")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(snapshot / file))
    assert resolve_model("org/cached") == str(snapshot)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A randomly initialised Qwen2 of a few thousand parameters, saved in bfloat16."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        dtype="bfloat16",
    )
    folder = tmp_path_factory.mktemp("tiny")
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_model_is_loaded_in_the_dtype_asked_for_with_exact_rotary_frequencies(tiny, capfd):
    import torch

    for name in DTYPES:
        model = load_model(str(tiny), parse_dtype(name))
        assert {p.dtype for p in model.parameters()} == {getattr(torch, name)}
        assert not model.training
        # `model.to(dtype)` would leave float32 frequencies rounded to that dtype, or in it.
        expected = 1.0 / 10000.0 ** (torch.arange(0, 8, 2, dtype=torch.float32) / 8)
        assert torch.equal(model.model.rotary_emb.inv_freq, expected)
    assert capfd.readouterr() == ("", ""), "loading is silent"


def test_a_checkpoint_that_lacks_a_weight_is_refused(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    message = "are incomplete\\. Missing tensors: 1 \\(first: model.layers.1.mlp.down_proj.weight\\)"
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path / "m"), parse_dtype("float32"))


@pytest.mark.parametrize("damage", ["truncated weights", "config is no JSON", "unknown architecture", "quantised"])
def test_a_damaged_checkpoint_is_one_clear_error(tiny, tmp_path, damage):
    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    if damage == "truncated weights":
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    elif damage == "config is no JSON":
        (folder / "config.json").write_text("{")
    elif damage == "quantised":  # by a library that is not installed
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (folder / "config.json").write_text(json.dumps(config))
    else:
        (folder / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(UserError, match=r"^cannot load a model from '.*/m': ."):
        load_model(str(folder), parse_dtype("float32"))


def test_a_folder_without_a_tokenizer_is_one_clear_error(tiny):
    with pytest.raises(UserError, match=r"^cannot load a tokenizer from '.*': ."):
        load_tokenizer(str(tiny))


# -- what a run leaves behind


def test_the_environment_names_what_ran(monkeypatch):
    found = environment_record()
    keys = "kernel_surgery, python, torch, triton, transformers, platform, device, commit, dirty"
    assert ", ".join(found) == keys
    assert found["kernel_surgery"] == __version__
    assert all(found[key] for key in ("python", "torch", "transformers", "platform", "device"))
    json.dumps(found)


def test_an_installed_copy_does_not_report_the_commit_around_it(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(tmp_path)]
    try:
        subprocess.run([*git, "init", "-q"], check=True, capture_output=True)
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("git is not usable here")
    monkeypatch.setattr(environment, "PACKAGE", tmp_path.resolve() / "site-packages" / "kernel_surgery")
    (tmp_path / "site-packages").mkdir()
    assert _git_state.__wrapped__() == (None, None)
    for told, dirty in (("abc", False), ("abc-dirty", True)):  # a copy that was sent somewhere without its history
        monkeypatch.setenv("KERNEL_SURGERY_COMMIT", told)
        assert _git_state.__wrapped__() == ("abc", dirty)
    monkeypatch.setattr(environment, "PACKAGE", tmp_path.resolve() / "kernel_surgery")  # git knows better
    commit, dirty = _git_state.__wrapped__()
    assert len(commit) == 40 and dirty is False
    for record in ("certificate.json", "kernel_surgery/notes.txt", "docs/page.md", "tests/test_new.py"):
        (tmp_path / record).parent.mkdir(exist_ok=True)
        (tmp_path / record).touch()
    assert _git_state.__wrapped__() == (commit, False), "what a run or a reader leaves there changes no figure"
    (tmp_path / "kernel_surgery" / "new.py").touch()
    assert _git_state.__wrapped__() == (commit, True)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "new" / "results.json"
    write_atomic(target, "één\n")
    assert target.read_bytes() == "één\n".encode()

    def full_disk(source, destination):
        assert Path(source).read_text() == "second", "renamed only when complete"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(KernelSurgeryError, match=r"cannot write '.*results.json': No space left on device. Make room"):
        write_atomic(target, "second")
    assert target.read_text(encoding="utf-8") == "één\n"
    assert [path.name for path in target.parent.iterdir()] == ["results.json"]


def test_progress_is_for_a_terminal(capfd):
    assert list(progress(range(3), total=3, desc="items")) == [0, 1, 2]
    assert capfd.readouterr() == ("", "")

    code = "from kernel_surgery.common.progress import progress; print(sum(progress(range(3), desc='items')))"
    terminal, other_end = pty.openpty()
    termios.tcsetwinsize(other_end, (24, 80))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=other_end, text=True)
    os.set_blocking(terminal, False)
    shown = os.read(terminal, 4096).decode()
    os.close(terminal)
    os.close(other_end)
    assert done.stdout == "3\n" and "items:" in shown, shown
