"""Checks a trained model: llama.cpp computes what PyTorch does, and every depth is found; prints the card's tables.

    python models/check.py models/lrope-kv.gguf

Needs PyTorch, and lrope-gguf with its native part.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from architecture import N_LAYER, Llama
from export import weight_names
from train import MAX_PAIRS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support import llama_direct

from lrope_gguf.native import tool_path
from lrope_search.evaluation.evaluator import TeacherForcedEvaluator
from lrope_search.evaluation.model import Model
from lrope_search.tasks import KeyValueTask

BASE = (1.0,) * N_LAYER
FACTORS = (0.75, 1.25, 2.25, 3.3)
LENGTHS = (16, 32, MAX_PAIRS, 64, 80, 96, 120)  # pairs
N_DEPTHS, N_CONTEXTS = 11, 200
SEED = 1000  # of contexts that no search or test uses
LOGITS_ERROR, LEAST_ACCURACY = 1e-4, 0.95


def torch_model(path: Path) -> Llama:
    """The model of a GGUF file, in PyTorch."""
    tensors = {tensor.name: np.array(tensor.data).astype(np.float32) for tensor in gguf.GGUFReader(path).tensors}
    model = Llama()
    model.load_state_dict({own: torch.from_numpy(tensors[name]) for name, own in weight_names().items()})
    return model.double()


def compare(path: Path) -> bool:
    """Print how far llama.cpp is from PyTorch in float64; whether float32 weights give the same logits."""
    reference = torch_model(path)
    context = KeyValueTask(MAX_PAIRS, probes=2, positions="even", identifiers="word", seed=SEED).context("test", 0)
    good = True
    print("| weights | factors | largest difference of a logit | logits' spread |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder) / "f32.gguf"
        subprocess.run([tool_path("llama-quantize"), path, exact, "F32"], check=True, capture_output=True)
        with Model(path) as model:
            tokens = model.tokenize_prompt(context.prefix + context.probes[0].question).astype(np.int64)
        n = len(tokens)
        mask = torch.ones(n, n, dtype=torch.bool).tril()
        for name, file in (("F32", exact), ("F16", path)):
            for factors in (BASE, FACTORS):
                with torch.no_grad():
                    given = torch.from_numpy(tokens)[None], torch.arange(n), mask
                    wanted = reference(*given, factors=factors)[0].numpy()
                # a client with a cache in float32
                with llama_direct.Context(file, n) as direct:
                    direct.set_factors(list(factors))
                    error = np.abs(direct.decode(tokens.tolist()) - wanted).max()
                good &= name != "F32" or error < LOGITS_ERROR * wanted.std()
                listed = ", ".join(f"{factor:g}" for factor in factors)
                print(f"| {name} | {listed} | {error:.1e} | {wanted.std():.1f} |")
    return bool(good)


def accuracies(path: Path) -> bool:
    """Print accuracy by depth and length without factors; whether every depth is found up to `MAX_PAIRS`."""
    depths = np.linspace(0.0, 1.0, N_DEPTHS)
    print("\n| pairs | tokens | " + " | ".join(f"{depth:.1f}" for depth in depths) + " | all |")
    print("|---" * (N_DEPTHS + 3) + "|")
    good = True
    with Model(path) as model:
        for n_pairs in LENGTHS:
            task = KeyValueTask(n_pairs, probes=N_DEPTHS, positions="even", identifiers="word", seed=SEED)
            evaluator = TeacherForcedEvaluator(model, task)
            scores = [evaluator.evaluate(BASE, "test", i) for i in range(N_CONTEXTS)]
            by_depth = np.mean([[probe.correct for probe in score.probes] for score in scores], axis=0)
            good &= n_pairs > MAX_PAIRS or by_depth.min() >= LEAST_ACCURACY
            cells = " | ".join(f"{100 * share:.0f}" for share in by_depth)
            print(f"| {n_pairs} | {2 * n_pairs + 4} | {cells} | {100 * by_depth.mean():.1f} |")
    return bool(good)


def main() -> int:
    """Print both tables; exit status 1 if a claim fails."""
    parser = argparse.ArgumentParser(description="check a trained model")
    parser.add_argument("model", metavar="FILE", type=Path, help="GGUF file of train.py")
    path = parser.parse_args().model
    same, found = compare(path), accuracies(path)
    if not same:
        print("llama.cpp does not compute what PyTorch does", file=sys.stderr)
    if not found:
        print(f"a depth up to {MAX_PAIRS} pairs is found less often than in {LEAST_ACCURACY:.0%}", file=sys.stderr)
    return int(not (same and found))


if __name__ == "__main__":
    sys.exit(main())
