"""Fitting: the fastest exact method, the script's, and a top-k solver: python -m bench.fit [--out FILE]

Synthetic activations of a real model's size: 200 problems in seven languages, d_model 2048, a few strong language
directions in noise, so that the leading singular values are apart and the rest is not. The script that this project
began with takes numpy's full SVD of the 1400 x 2048 deviations of every layer, in float32.

Each provider gets the same activations and gives the basis; timed side by side, layer by layer. Beside the time stand
the largest principal angle to the float64 SVD's subspace, and the residual norm(G u - s^2 u) / s_1^2 of the worst
vector, G = X^T X: how far it is from being a singular vector at all.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from bench.timing import interleaved, percentiles, ratio
from kernel_surgery import cli

FULL, OURS, SVD, TOP = "numpy full SVD", "kernel_surgery.fit", "torch SVD, float64", "scipy svds (top k)"
