"""Packaging. Static on purpose: nothing here reads a file, runs a command or looks at the machine.

The Triton kernels live in the folder `kernels/` and are installed as `kernel_surgery.kernels`. There
must never be an installed top-level package `kernels`: that name belongs to a PyPI package which transformers
imports (CONTRIBUTING.md, "The kernels trap"). Packages are therefore listed, not searched for.
"""

from setuptools import setup

# A package index shows this page. README.md does not fit: its pictures and links lead to files of the clone.
DESCRIPTION = """\
# Kernel Surgery

Kernel Surgery finds the directions in which a multilingual language model's activations change when only the language
changes. It removes them from the model's MLPs, and it measures exactly what changed.

A small model comes with it, so a first run needs no download and no GPU:

```bash
pip install kernel-surgery
kernel-surgery eval --mode fused
```

It compares that model with and without its language subspace, and writes a report. From Python:

```python
from kernel_surgery import POLYGLOT_SUBSPACE, Subspace, compare_texts, load_model, load_tokenizer

model, tokenizer = load_model("polyglot"), load_tokenizer("polyglot")
subspace = Subspace.load(POLYGLOT_SUBSPACE)
for strength in (1.0, 2.0):  # 1 removes the subspace, 2 reflects it
    (pair,) = compare_texts(model, tokenizer, ["Work out 238 + 152."], subspace, strength=strength)
    print(pair)
```

`kernel-surgery` lists the commands. They collect activations, fit a subspace, write the edit into a checkpoint or as an
adapter, certify it, and evaluate it. They take most open-weight models. The source distribution holds the documentation
(`docs/`), a notebook (`examples/`), the tests and the benchmarks.

It is tested on Linux, with Python 3.11 and 3.12.
"""

setup(
    name="kernel-surgery",
    version="0.1.0",
    description="Measure the language subspace of a multilingual LM, remove it, and prove what that did",
    long_description=DESCRIPTION,
    long_description_content_type="text/markdown",
    keywords=["interpretability", "language models", "model editing", "concept erasure", "multilinguality"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        "kernel_surgery",
        "kernel_surgery.common",
        "kernel_surgery.numerics",
        "kernel_surgery.problems",
        "kernel_surgery.scoring",
        "kernel_surgery.files",
        "kernel_surgery.quantised",
        "kernel_surgery.models",
        "kernel_surgery.subspace",
        "kernel_surgery.ops",
        "kernel_surgery.edit",
        "kernel_surgery.damage",
        "kernel_surgery.checkpoint",
        "kernel_surgery.engines",
        "kernel_surgery.certify",
        "kernel_surgery.evaluation",
        "kernel_surgery.studies",
        "kernel_surgery.lmeval",
        "kernel_surgery.polyglot",
        "kernel_surgery.kernels",
    ],
    package_dir={"kernel_surgery.kernels": "kernels"},
    package_data={
        "kernel_surgery": ["py.typed"],
        "kernel_surgery.kernels": ["*.json"],
        "kernel_surgery.problems": ["*.json"],
        "kernel_surgery.lmeval": ["*.yaml"],
        "kernel_surgery.polyglot": [
            *("model/*.safetensors", "model/*.json", "model/*.md", "*.safetensors", "*.json", "*.jsonl"),
        ],
    },
    include_package_data=False,
    entry_points={
        "console_scripts": ["kernel-surgery = kernel_surgery.__main__:script"],
        "vllm.general_plugins": ["kernel_surgery = kernel_surgery.engines.plugin:register"],
    },
    install_requires=[
        "torch>=2.11",
        # torch's CPU builds do not bring triton along; it has wheels for Linux alone.
        'triton>=3.6; sys_platform == "linux"',
        # Earlier releases take the namespace folder `kernels/` of a clone for the PyPI package.
        "transformers>=5.10.2",
        "numpy>=2.0",
        "einops>=0.8",
        "safetensors>=0.5",
        "tqdm>=4.66",
        "scipy>=1.13",
        "py3langid>=0.4",
        "matplotlib>=3.9",
        "psutil>=5.9",
    ],
    extras_require={
        # setuptools: tests/test_packaging.py builds the wheel and the source distribution.
        "test": [
            *("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "setuptools>=77"),
            *("peft>=0.18", "nnsight>=0.8", "ruff>=0.6", "mypy>=2"),
            *("gguf>=0.10", "accelerate", "concept-erasure>=0.2.4", "optuna>=4.2", "openai>=2"),
            "compressed-tensors>=0.15",
            *("zensical>=0.0.73", "math-core>=0.9"),
            # The notebook is run by Jupyter's own client.
            *("nbclient>=0.10", "ipykernel>=6.29"),
        ],
        # The site of the documentation (`make docs`).
        "docs": ["zensical>=0.0.73", "math-core>=0.9"],
        # What the benchmarks run beside ours.
        "peers": ["peft>=0.18", "nnsight>=0.8"],
        # GGUF files, SmolLM2 among them.
        "gguf": ["gguf>=0.10", "accelerate"],
        # Checkpoints of compressed-tensors, loaded by transformers. Their files are read and written without it.
        "compressed-tensors": ["compressed-tensors>=0.15"],
        "lora": ["peft>=0.18"],
        # study with a [search].
        "search": ["optuna>=4.2"],
        "accelerate": ["accelerate"],
        # vLLM pins its own torch: install it in an environment of its own (docs/engines.md).
        "vllm": ["vllm>=0.32"],
        "openai": ["openai>=2"],
        "lm-eval": ["lm-eval"],
    },
)
