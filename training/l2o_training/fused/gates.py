"""What is between the matrix products of an LSTM layer, as code: the gates forward, and their derivatives.

σ(x) = ½ (1 + tanh(x/2)), and tanh is a quotient of polynomials. Divisions are what the processor waits for, so
quotients are brought to a common denominator.
"""

from l2o_runtime.kernels.emit import Vector


def forward(sums: list[Vector], c: Vector) -> tuple[Vector, Vector]:
    """h' = σ(o) tanh(c') and c' = σ(f) c + σ(i) tanh(g).

    Args:
        sums: pre-activations, in the order i, f, g, o.
        c: cell state.
    """
    (ni, di), (nf, df), (ng, dg), (no, do) = _ratios(sums)
    both = di * dg
    cell = ((nf + df) * c * both + (ni + di) * ng * df) / ((df + df) * both)
    nc, dc = cell.tanh_ratio()
    return (no + do) * nc / ((do + do) * dc), cell


def backward(
    sums: list[Vector], down: Vector, c: Vector, new_c: Vector, grad_h: Vector, grad_c: Vector
) -> tuple[list[Vector], Vector]:
    """Derivatives by the pre-activations, in their order, and by c; the gates are computed again.

    Args:
        sums: pre-activations, in the order i, f, g, o.
        down: derivative by h' from the layer above.
        c, new_c: cell state before and after the step.
        grad_h, grad_c: derivatives by h' and c' from the next step.
    """
    i, f, g, o, t = _divide([*_ratios(sums), new_c.tanh_ratio()])
    i, f, o = (x.fma(0.5, 0.5) for x in (i, f, o))
    d = grad_h + down
    through = d * o
    e = (through - through * t * t) + grad_c
    ei, eg, ef = e * i, e * g, e * f
    return [eg * (i - i * i), ef * c * (i.like(1.0) - f), ei - ei * g * g, d * t * (o - o * o)], ef


def _ratios(sums: list[Vector]) -> list[tuple[Vector, Vector]]:
    """Numerators and denominators of tanh(i/2), tanh(f/2), tanh(g), tanh(o/2)."""
    return [(x if index == 2 else x * 0.5).tanh_ratio() for index, x in enumerate(sums)]


def _divide(ratios: list[tuple[Vector, Vector]]) -> list[Vector]:
    """All quotients with one division: 1/a = b (1/(a b)), and so on."""
    products = [ratios[0][1]]
    for _, denominator in ratios[1:]:
        products.append(products[-1] * denominator)
    inverse = products[-1].like(1.0) / products[-1]
    quotients = []
    for (numerator, denominator), before in zip(reversed(ratios[1:]), reversed(products[:-1]), strict=True):
        quotients.append(numerator * (inverse * before))
        inverse = inverse * denominator
    return [ratios[0][0] * inverse, *reversed(quotients)]
