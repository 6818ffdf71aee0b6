"""l2o bench."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from l2o_cli.console import Json, Threads, err, friendly_errors, out, print_json, set_threads


def bench(
    rule: Annotated[str, typer.Option(help="A rule: a bundled name or a file.")] = "default",
    sizes: Annotated[
        str, typer.Option(help="Models: mlp (16 k), cnn (1.2 M), resnet18 (11.7 M), vit (86.6 M).")
    ] = "mlp,cnn",
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of every optimizer, at most.")] = 20,
    seconds: Annotated[float, typer.Option(min=0, help="Begin no further round after this long (at least 3).")] = 60.0,
    extra: Annotated[
        list[str] | None, typer.Option(help="Time another optimizer, such as torch.optim:SGD; may be repeated.")
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

        from l2o_training.benchmark.bench import bench as run
        from l2o_training.benchmark.contenders import contenders
        from l2o_training.benchmark.models import parse_sizes
        from l2o_training.config import pick_device

        set_threads(threads)
        place = torch.device(pick_device(device))
        chosen = parse_sizes(sizes)
        entrants = contenders(rule, extra or (), torch.bfloat16 if state_dtype == "bfloat16" else torch.float32)
        with err.status("benchmarking") as status:
            content = run(
                entrants,
                chosen,
                steps=steps,
                seconds=seconds,
                device=place,
                memory=None if memory is None else round(memory * 1e9),
                out=out_dir,
                settings={"rule": rule, "extra": extra or [], "state_dtype": state_dtype},
                report=lambda text: status.update(Text(text)),
            )
        if as_json:
            print_json(content)
            return
        for size in chosen:
            rows = [row for row in content["results"] if row["size"] == size]
            out.print(_table(rows, size, content["rates"][size]))
            for row in rows:
                if row["skipped"]:
                    out.print(f"{size}: {row['optimizer']} skipped: {row['skipped']}", soft_wrap=True)
        if state_dtype == "float32" and any(row["skipped"] for row in content["results"]):
            out.print(
                "--state-dtype bfloat16 halves what learned rules keep of gradients and in their LSTM",
                soft_wrap=True,
            )
        err.print(f"results.json, results.csv and growth.png are in {out_dir}", soft_wrap=True)


def _table(rows: list[dict[str, Any]], size: str, rates: dict[str, float]) -> Table:
    """Optimizers down, figures across."""
    machine = (
        f"; the machine: {rates['gemm_flops_per_s'] / 1e9:.0f} GFLOP/s, {rates['copy_bytes_per_s'] / 1e9:.1f} GB/s"
        if rates
        else ""
    )
    table = Table("optimizer", title=f"{size}, {rows[0]['parameters']:,} parameters{machine}")
    titles = ("ms per step", "p10 … p90", "ns per param", "× Adam foreach", "× Adam fused", "context")
    for title in (*titles, "floor ns GEMM", "floor ns copy", "state B/param", "peak MB", "RSS MB"):
        table.add_column(title, justify="right")
    for row in rows:
        if row["skipped"]:
            continue
        over = row["context_overhead"]
        cells = [_ms(row["median_s"]), f"{_ms(row['p10_s'])} … {_ms(row['p90_s'])}"]
        cells += [_number(row[key]) for key in ("ns_per_parameter", "ratio_foreach", "ratio_fused")]
        cells += ["" if over is None else f"{over:+.1%}"]
        cells += [_number(row[key]) for key in ("gemm_floor_ns", "copy_floor_ns", "state_bytes_per_parameter")]
        cells += [_megabytes(row["transient_bytes"]), _megabytes(row["resident_bytes"])]
        table.add_row(row["optimizer"], *cells)
    return table


def _ms(seconds: float) -> str:
    return _number(1000 * seconds)


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:,.1f}"


def _number(value: float | None) -> str:
    """Three digits, whole numbers above that."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
