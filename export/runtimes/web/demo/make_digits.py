"""Write digits.js, scikit-learn's digits as text: python export/runtimes/web/demo/make_digits.py."""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

COUNT = 1500


def main() -> None:
    """A letter for each of 64 pixels, a for 0 to q for 16, and a figure for each label; in a seeded order."""
    images, labels = load_digits(return_X_y=True)
    chosen = np.random.RandomState(0).permutation(len(labels))[:COUNT]
    pixels = "".join(chr(ord("a") + int(value)) for value in images[chosen].flatten())
    figures = "".join(str(label) for label in labels[chosen])
    note = f"// {COUNT} of scikit-learn's digits (UCI, optical recognition), 8 × 8 pixels each; made by make_digits.py."
    text = f'{note}\nexport const pixels = "{pixels}";\nexport const labels = "{figures}";\n'
    Path(__file__).with_name("digits.js").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
