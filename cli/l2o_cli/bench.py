"""l2o bench."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from l2o_cli.console import (
    Json,
    Threads,
    Wide,
    err,
    fitting,
    friendly_errors,
    out,
    print_json,
    set_threads,
    show,
    table_of,
)

MODELS = (
    "Models: tiny (1.8 k), mlp (16 k), lenet (62 k), transformer (0.1 M), cnn (1.2 M), resnet18 (11.7 M), gpt (25 M), "
    "vit (86.6 M)."
)


def bench(
    rule: Annotated[str, typer.Option(help="A rule: a bundled name or a file.")] = "default",
    sizes: Annotated[str, typer.Option(help=MODELS)] = "mlp,cnn",
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of every optimizer, at most.")] = 20,
    seconds: Annotated[float, typer.Option(min=0, help="Begin no further round after this long (at least 3).")] = 60.0,
    extra: Annotated[
        list[str] | None, typer.Option(help="Time another optimizer, such as torch.optim:SGD; may be repeated.")
    ] = None,
    exported: Annotated[
        Path | None, typer.Option(help="Time the .pt, .pt2 and .onnx files of this folder too.", show_default=False)
    ] = None,
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="Folder for results.")] = Path("runs/bench"),
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "cpu",
    memory: Annotated[
        float | None, typer.Option(min=0.1, help="GB that may be used.", show_default="nine tenths of what is free")
    ] = None,
    state_dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="What learned rules keep their state in.")
    ] = "float32",
    threads: Threads = 0,
    wide: Wide = False,
    as_json: Json = False,
) -> None:
    """Time optimizer steps: Adam, learned rules with every context, the plain LSTM, and peers by import path.

    All take turns in one process, on parameters of real models with random gradients. Beside the times stand the
    machine's own floors from the same run, bytes of state, and the peak of transient memory. The folder gets
    results.json, results.csv and growth.png. What does not fit into memory is skipped.

    Example: l2o bench --sizes mlp,cnn,resnet18 --threads 1 --extra torch.optim:SGD
    """
    with friendly_errors():
        import torch

        from l2o_training.bench.models import parse_sizes
        from l2o_training.bench.racers import racers
        from l2o_training.bench.run import bench as run
        from l2o_training.config import pick_device

        set_threads(threads)
        place = torch.device(pick_device(device))
        chosen = parse_sizes(sizes)
        dtype = torch.bfloat16 if state_dtype == "bfloat16" else torch.float32
        competing = racers(rule, extra or (), dtype, exported)
        with err.status("benchmarking") as status:
            content = run(
                competing,
                chosen,
                steps=steps,
                seconds=seconds,
                device=place,
                memory=None if memory is None else round(memory * 1e9),
                out=out_dir,
                settings={
                    "rule": rule,
                    "extra": extra or [],
                    "exported": None if exported is None else str(exported),
                    "state_dtype": state_dtype,
                },
                report=lambda text: status.update(Text(text)),
            )
        if as_json:
            print_json(content)
            return
        for size in chosen:
            rows = [row for row in content["results"] if row["size"] == size]
            tell(rows, content["rates"][size], f"rule {rule}", wide=wide)
        if state_dtype == "float32" and any(row["skipped"] for row in content["results"]):
            out.print(
                "--state-dtype bfloat16 halves what learned rules keep of gradients and in their LSTM",
                soft_wrap=True,
            )
        files = f"results.json, results.csv and growth.png are in {out_dir}"
        err.print(f"{files}; --wide prints all columns", soft_wrap=True)


def tell(rows: list[dict[str, Any]], rates: dict[str, float], rule: str, *, wide: bool) -> None:
    """Print the table of one size, what the rule costs in words, and what was skipped."""
    count = fitting(partial(table, rows, rates), len(FIGURES), wide=wide)
    show(table(rows, rates, count), wide=wide)
    for row in rows:
        if row["skipped"]:
            out.print(f"{row['size']}: {row['optimizer']} skipped: {row['skipped']}", soft_wrap=True)
        elif row["optimizer"] == rule:
            out.print(f"{row['size']}: {cost(row)}")


def cost(row: dict[str, Any]) -> str:
    """What a rule's step costs, in a sentence."""
    against = (("Adam", "ratio_adam"), ("Adam foreach", "ratio_foreach"), ("Adam fused", "ratio_fused"))
    ratios = [(name, row[key]) for name, key in against if row[key] is not None]
    times = ", ".join(f"{_number(ratio)} × that of {name}" for name, ratio in ratios)
    return f"the step of {row['optimizer']} takes {_ms(row['median_s'])} ms{times and ', ' + times}."


def table(rows: list[dict[str, Any]], rates: dict[str, float], count: int) -> Table:
    """Optimizers down, the first `count` figures across."""
    gemm, copy = rates.get("gemm_flops_per_s", 0) / 1e9, rates.get("copy_bytes_per_s", 0) / 1e9
    machine = f"; the machine: {gemm:.0f} GFLOP/s, {copy:.1f} GB/s" if rates else ""
    title = f"{rows[0]['size']}, {rows[0]['parameters']:,} parameters{machine}"
    found = table_of("optimizer", *list(FIGURES)[:count], title=title)
    for row in rows:
        if not row["skipped"]:
            found.add_row(row["optimizer"], *(figure(row) for figure in list(FIGURES.values())[:count]))
    return found


def _ms(seconds: float) -> str:
    return _number(1000 * seconds)


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:,.1f}"


def _number(value: float | None) -> str:
    """Three digits, whole numbers above that."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


FIGURES: dict[str, Callable[[dict[str, Any]], str]] = {
    "ms per\nstep": lambda row: _ms(row["median_s"]),
    "×\nAdam": lambda row: _number(row["ratio_adam"]),
    "× Adam\nfused": lambda row: _number(row["ratio_fused"]),
    "× Adam\nforeach": lambda row: _number(row["ratio_foreach"]),
    "state\nB/param": lambda row: _number(row["state_bytes_per_parameter"]),
    "peak\nMB": lambda row: _megabytes(row["transient_bytes"]),
    "context": lambda row: "" if row["context_overhead"] is None else f"{row['context_overhead']:+.1%}",
    "p10 to p90\nms": lambda row: f"{_ms(row['p10_s'])} to {_ms(row['p90_s'])}",
    "ns per\nparam": lambda row: _number(row["ns_per_parameter"]),
    "RSS\nMB": lambda row: _megabytes(row["resident_bytes"]),
    "floor ns\nGEMM": lambda row: _number(row["gemm_floor_ns"]),
    "floor ns\ncopy": lambda row: _number(row["copy_floor_ns"]),
}
"""Columns, the most telling ones first: what a terminal has no room for is in results.csv."""
