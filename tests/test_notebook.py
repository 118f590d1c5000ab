"""examples/first_steps.ipynb runs, and what is stored in it is what a run gives.

python -m tests.test_notebook --update (make notebook) runs it again and stores the outputs, after a change that was
meant.

It is run by nbclient, Jupyter's own client, which pytest's plugins for notebooks use too. The same function runs it
here and there, in the kernel of this interpreter, whatever kernels the user has registered.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from traitlets import default

from tests.test_golden import printed_differences
from tests.test_imports import PRIVATE

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "first_steps.ipynb"
UPDATE = "run make notebook if the change was meant"
SECONDS = 300  # for one cell, on a busy machine


class Kernel(AsyncKernelManager):
    """The kernel of the interpreter that runs this."""

    @default("kernel_spec_manager")
    def _kernel_spec_manager_default(self):
        return KernelSpecManager(kernel_dirs=[])


def executed(notebook, folder: Path):
    """A copy of the notebook with the outputs of a run in `folder`, without what differs from run to run."""
    copy = nbformat.from_dict(notebook)
    for name in ("ipython", "runtime", "config"):
        (folder / name).mkdir()
    own = {"IPYTHONDIR": "ipython", "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTER_CONFIG_DIR": "config"}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {name: str(folder / there) for name, there in own.items()} | {"PYTHONPATH": path}
    env["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm would rather draw its bars with ipywidgets
    options = {"timeout": SECONDS, "record_timing": False, "coalesce_streams": True, "kernel_manager_class": Kernel}
    options["extra_arguments"] = ["--log-level=ERROR"]  # it warns that the loopback interface is not encrypted
    with pytest.MonkeyPatch.context() as patch:  # the connection file is written by this process
        patch.setenv("JUPYTER_RUNTIME_DIR", env["JUPYTER_RUNTIME_DIR"])
        NotebookClient(copy, resources={"metadata": {"path": str(folder)}}, **options).execute(env=env)
    copy.metadata.language_info = {"name": "python"}  # not the release that ran it
    return copy


def stored():
    return nbformat.read(NOTEBOOK, as_version=4)


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def complaints(notebook) -> list[str]:
    """What a reader of the stored notebook should not find; an empty list if there is nothing."""
    cells, text = code(notebook), nbformat.writes(notebook)
    said = [f"it mentions {word.decode()}" for word in PRIVATE if word.decode() in text]
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        said.append("its cells were not executed once each, in order")
    for cell in cells:
        name = f"cell {cell.id}"
        said += [f"{name} ends in an error" for output in cell.outputs if output.output_type == "error"]
        said += [f"{name} writes to stderr" for output in cell.outputs if output.get("name") == "stderr"]
        pictures = ["image/png" in output.get("data", {}) for output in cell.outputs]
        if ("plt.show()" in cell.source) != any(pictures):
            said.append(f"{name} has a picture without plt.show(), or none with it")
    return said


def test_the_stored_notebook_is_whole_and_names_no_machine():
    nbformat.validate(stored())
    assert complaints(stored()) == [], UPDATE
    assert len(stored().cells) <= 25 and NOTEBOOK.stat().st_size < 400_000


def planted(kind: str):
    notebook = stored()
    cell = next(cell for cell in code(notebook) if "plt.show()" in cell.source)
    if kind == "path":
        cell.outputs.append(nbformat.v4.new_output("stream", text=f"saved in {PRIVATE[0].decode()}x"))
    elif kind == "order":
        cell.execution_count += 1
    elif kind == "error":
        cell.outputs.append(nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[]))
    elif kind == "warning":
        cell.outputs.append(nbformat.v4.new_output("stream", name="stderr", text="a warning"))
    else:
        cell.outputs.clear()
    return notebook


@pytest.mark.parametrize(
    "kind, said",
    {
        "path": "it mentions",
        "order": "not executed once each, in order",
        "error": "ends in an error",
        "warning": "writes to stderr",
        "picture": "has a picture without",
    }.items(),
)
def test_a_planted_fault_is_seen(kind, said):
    (complaint,) = complaints(planted(kind))
    assert said in complaint


def test_its_links_lead_to_files():
    text = "\n".join(cell.source for cell in stored().cells if cell.cell_type == "markdown")
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets and [target for target in targets if not (NOTEBOOK.parent / target).is_file()] == []


def output_differences(one, other):
    """Where the outputs of two runs differ, in sentences. Of pictures, only whether there is one."""
    for was, now in zip(code(one), code(other), strict=True):
        kinds = [[(o.output_type, *sorted(o.get("data", {}))) for o in cell.outputs] for cell in (was, now)]
        if kinds[0] != kinds[1]:
            yield f"cell {was.id} gives {kinds[1]}, gave {kinds[0]}"
            continue
        for before, after in zip(was.outputs, now.outputs, strict=True):
            for line in printed_differences(before.get("text", ""), after.get("text", "")):
                yield f"cell {was.id}: {line}"


@pytest.mark.slow
def test_a_run_gives_what_is_stored(tmp_path):
    again = executed(stored(), tmp_path)
    assert complaints(again) == []
    assert list(output_differences(stored(), again)) == [], UPDATE
    last = next(cell for cell in reversed(code(again)) if cell.outputs and cell.outputs[0].get("text"))
    last.outputs[0].text = last.outputs[0].text.replace("strength", "weight", 1)
    assert len(list(output_differences(stored(), again))) == 1, "the comparison can fail"


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit("usage: python -m tests.test_notebook --update")
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(executed(stored(), Path(folder)), NOTEBOOK)
