"""The least that a rollback on a GPU can cost, computed: ``python -m benchmarks.gpu.floor``.

Neurons are chosen at random, weights are 16 bits wide. A row of gate or up is contiguous, so its bytes are what moves.
A neuron of down is a column: one number in each of the hidden size's rows, and memory moves a whole sector for it (32
bytes; often two together). A rollback reads the sectors of the earlier weights, reads and writes those of the model,
and writes the originals once into a buffer. The rates are what a device-to-device copy reaches, bytes read and written.
"""

from __future__ import annotations

import textwrap

from benchmarks.gpu.shapes import QWEN3_4B, QWEN3_30B_A3B, Shape
from benchmarks.seeds import RESULTS, write

SHARES = (0.002, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
RATES = {"H100": 3.0e12, "H200": 4.3e12}  # bytes per second
BYTES = 2


def rows_of(shape: Shape, share: float) -> tuple[float, float]:
    """Bytes of the chosen neurons' rows in gate and up, and of their columns in down."""
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    neurons = shape.get("num_experts", 1) * shape.get("moe_intermediate_size", shape["intermediate_size"]) * layers
    return 2 * share * neurons * hidden * BYTES, share * neurons * hidden * BYTES


def sectors(shape: Shape, share: float, size: int) -> float:
    """The bytes of down's sectors of ``size`` bytes that hold at least one chosen neuron's number, on average."""
    whole = rows_of(shape, 1.0)[1]
    return whole * (1 - (1 - share) ** (size // BYTES))


def moved(shape: Shape, share: float, size: int) -> float:
    """Bytes that a rollback from earlier weights on the device moves."""
    rows, columns = rows_of(shape, share)
    return 3 * (rows + sectors(shape, share, size)) + rows + columns


def table(shape: Shape) -> str:
    """One line a share."""
    lines = [
        "| chosen | rows, MB | columns, MB | sectors of down, MB | moved, GB | "
        + " | ".join(f"{n}, ms" for n in RATES)
        + " |",
        "|---" * (5 + len(RATES)) + "|",
    ]
    for share in SHARES:
        rows, columns = rows_of(shape, share)
        low, high = (sectors(shape, share, size) / 1e6 for size in (32, 64))
        few, many = (moved(shape, share, size) for size in (32, 64))
        times = " | ".join(f"{1e3 * few / rate:.2f} to {1e3 * many / rate:.2f}" for rate in RATES.values())
        lines.append(
            f"| {100 * share:g} % | {rows / 1e6:,.0f} | {columns / 1e6:,.0f} | {low:,.0f} to {high:,.0f} | "
            f"{few / 1e9:.2f} to {many / 1e9:.2f} | {times} |"
        )
    return "\n".join(lines)


def main() -> None:
    """A page with both shapes' tables."""
    assert __doc__ is not None
    told = " ".join(__doc__.split("\n\n")[1].split())
    text = textwrap.fill(f"Computed by `python -m benchmarks.gpu.floor`, not measured. {told}", 120)
    lines = [f"# The least that a rollback on a GPU can cost\n\n{text}\n"]
    for name, shape in (("Qwen3-4B", QWEN3_4B), ("Qwen3-30B-A3B", QWEN3_30B_A3B)):
        lines.append(f"## {name} shape, bf16\n\n{table(shape)}\n")
    write(RESULTS, "gpu-floor", "\n".join(lines))


if __name__ == "__main__":
    main()
