"""Denoise a photograph: a dictionary learned on one picture, sparse codes of another one's patches by LISTA.

LISTA is meta-trained without solutions: its meta-loss is that of the Lasso, ½‖A x − b‖² + λ‖x‖₁, on noisy patches
of the first picture. Beside it stand FISTA after as many steps, and after 200.

    python examples/sparse_coding.py --picture denoised.png
"""

import argparse
import time
import warnings

import numpy as np
import torch
from sklearn.datasets import load_sample_image
from sklearn.decomposition import MiniBatchDictionaryLearning
from sklearn.feature_extraction.image import extract_patches_2d, reconstruct_from_patches_2d

from l2o_runtime import LearnedSolver, save_rule
from l2o_runtime.solvers import UnrolledConfig, UnrolledSolver
from l2o_runtime.solvers.analytic import lipschitz
from l2o_runtime.solvers.classical import lasso, proximal_step

SIZE, ATOMS, LAYERS = 8, 128, 8
NOISE, WEIGHT = 0.1, 0.12
"""Standard deviation of the noise, and λ; pixels are from 0 to 1."""


def grey(name: str) -> np.ndarray:
    """A sample picture of scikit-learn at half its size, from 0 to 1."""
    return load_sample_image(name).mean(-1)[::2, ::2] / 255


def patches_of(picture: np.ndarray, count: int | None = None, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches (B, 64) less their means, and these (B, 1)."""
    found = extract_patches_2d(picture, (SIZE, SIZE), max_patches=count, random_state=seed).reshape(-1, SIZE**2)
    flat = torch.from_numpy(found).float()
    mean = flat.mean(-1, keepdim=True)
    return flat - mean, mean


def learn_dictionary(picture: np.ndarray) -> torch.Tensor:
    """A (64, 128), columns of norm 1, from patches that show something."""
    patches, _ = patches_of(picture, 20_000)
    lively = patches[patches.norm(dim=-1) > 0.5][:8000]
    learner = MiniBatchDictionaryLearning(ATOMS, alpha=0.5, batch_size=64, max_iter=15, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        atoms = torch.from_numpy(learner.fit(lively.numpy()).components_).float()
    return (atoms / atoms.norm(dim=-1, keepdim=True)).T


def meta_train(matrix: torch.Tensor, noisy: torch.Tensor, updates: int) -> UnrolledSolver:
    """LISTA on noisy patches: the Lasso's loss after the last layer."""
    config = UnrolledConfig(cell="lista", rows=SIZE**2, columns=ATOMS, layers=LAYERS, shrinkage=WEIGHT, horizon=LAYERS)
    solver, rng = UnrolledSolver(config), torch.Generator().manual_seed(0)
    solver.fit_to(matrix)
    optimizer = torch.optim.Adam(solver.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        b = noisy[torch.randint(len(noisy), (256,), generator=rng)]
        loss = lasso(solver(b), b, matrix, WEIGHT).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return solver


def fista(b: torch.Tensor, matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """Sparse codes by FISTA."""
    size, t = lipschitz(matrix), 1.0
    x = y = b.new_zeros(len(b), matrix.shape[1])
    for _ in range(steps):
        new, later = proximal_step(y, b, matrix, size, WEIGHT), (1 + (1 + 4 * t**2) ** 0.5) / 2
        x, y, t = new, new + (t - 1) / later * (new - x), later
    return x


def psnr(picture: np.ndarray, clean: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB."""
    return float(-10 * np.log10(np.mean((np.clip(picture, 0, 1) - clean) ** 2)))


def main() -> None:
    """Learn, denoise, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--updates", type=int, default=2000, help="of the meta-training")
    parser.add_argument("--out", default="sparse-coding.safetensors", help="file of the solver")
    parser.add_argument("--picture", help="PNG of the noisy, the denoised and the clean picture")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    known, clean = grey("china.jpg"), grey("flower.jpg")[20:148, 100:228]
    matrix = learn_dictionary(known)
    train, _ = patches_of(known + NOISE * rng.normal(size=known.shape), 40_000)
    save_rule(options.out, meta_train(matrix, train, options.updates), {})

    noisy = clean + NOISE * rng.normal(size=clean.shape)
    patches, means = patches_of(noisy)
    solver = LearnedSolver(options.out)
    ways = {
        f"LISTA, {LAYERS} layers": lambda: solver(patches),
        f"FISTA, {LAYERS} steps": lambda: fista(patches, matrix, LAYERS),
        "FISTA, 200 steps": lambda: fista(patches, matrix, 200),
    }
    print(f"noisy: {psnr(noisy, clean):.2f} dB; {len(patches):,} patches")
    shown = [noisy]
    for name, solve in ways.items():
        begun = time.perf_counter()
        codes = solve()
        seconds = time.perf_counter() - begun
        restored = (codes @ matrix.T + means).numpy().reshape(-1, SIZE, SIZE)
        shown.append(reconstruct_from_patches_2d(restored, clean.shape))
        loss = float(lasso(codes, patches, matrix, WEIGHT).mean())
        print(f"{name}: {psnr(shown[-1], clean):.2f} dB, loss {loss:.4f}, {seconds:.2f} s")
    if options.picture:
        from PIL import Image

        strip = np.hstack([np.clip(picture, 0, 1) for picture in (shown[0], shown[2], shown[1], clean)])
        Image.fromarray((255 * strip).round().astype(np.uint8)).save(options.picture, optimize=True)


if __name__ == "__main__":
    main()
