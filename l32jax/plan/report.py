"""A plan as people read it."""

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from l32jax.plan.planning import Plan, mesh_text

GIB = 2**30
TRUST = (
    "Memory and the program are the compiler's own. The time is modelled from the program and was "
    "not measured: the compiler's cycles of each operation, kernels at the share of the peak that "
    "their schedules reach, collectives at the links' bandwidth. It leaves out slow hosts, data, "
    "saving and jitter; compare plans by it, and take differences under 5 % for none."
)
ARITHMETIC = (
    "TPUs' was fitted to three compiled programs; what GPUs reach of their peaks is assumed. "
    "Compare plans by it, and take differences under 15 % for none."
)
TRUST_OF = {
    (): TRUST,
    ("time",): "Memory is the compiler's own. The time is arithmetic, not from the compiled "
    f"program. {ARITHMETIC}",
    ("memory", "time"): "Nothing was compiled: the time and the memory are arithmetic, not from "
    f"the compiled program. {ARITHMETIC}",
}


def print_plan(plan: Plan, *, num_steps: int) -> None:
    """Everything about one plan; `num_steps` are those of the hours and the energy."""
    console = Console(highlight=False)
    where = f"{plan.topology}: {plan.devices:,} devices, {mesh_text(plan.mesh)}"
    console.print(f"[bold]{plan.stage}[/] on {where}")
    table = Table.grid(padding=(0, 2))
    for name, value in _rows(plan, num_steps):
        table.add_row(name, value)
    console.print(table)
    if plan.time is not None:
        console.print(_parts(plan))
    console.print(TRUST_OF[plan.arithmetic], style="dim")


def print_candidates(plans: list[Plan]) -> None:
    """One line each, the fastest first."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for title in ("mesh", "saved", "tokens", "accumulate", "GiB", "step s", "MFU", "tokens/s"):
        table.add_column(
            title, no_wrap=True, justify="left" if title in ("mesh", "saved") else "right"
        )
    for plan in sorted(plans, key=rank):
        table.add_row(*_cells(plan))
    console = Console(highlight=False)
    console.print(table)
    for kind in {plan.arithmetic for plan in plans if plan.arithmetic}:
        console.print(TRUST_OF[kind], style="dim")


def rank(plan: Plan) -> float:
    """Seconds a token; infinite for what does not fit."""
    return float("inf") if plan.seconds is None else plan.seconds / plan.counts.tokens


def _rows(plan: Plan, num_steps: int) -> Iterator[tuple[str, str]]:
    counts, memory = plan.counts, plan.memory
    images = f", {counts.images:,} images in {counts.tiles:,} tiles" if counts.images else ""
    yield (
        "step",
        f"{counts.slots:,} tokens{images}; saved={plan.saved}, accumulate={plan.accumulate}",
    )
    parts = ("params", "optimizer", "batch", "work")
    sizes = ", ".join(f"{name} {getattr(memory, name) / GIB:.2f}" for name in parts)
    verdict = "fits" if memory.fits else "does not fit"
    yield (
        "memory",
        f"{sizes}; peak {memory.peak / GIB:.1f} of {plan.hbm_bytes / GIB:.0f} GiB: {verdict}",
    )
    if plan.time is None:
        return
    time, seconds = plan.time, plan.time.seconds
    if "memory" not in plan.arithmetic:
        yield "compiled", f"in {plan.compile_seconds:.0f} s"
    yield (
        "time",
        f"{seconds:.3g} s: products {time.matmul:.3g}, other {time.other:.3g}, "
        f"kernels {time.kernels:.3g}, waits for other devices {time.exposed:.3g}",
    )
    yield "utilisation", f"{plan.utilisation:.1%} of {plan.peak / 1e12:.0f} TFLOP/s (MFU)"
    sent = time.sent_along.items()
    told = [f"{'+'.join(axes) or 'none'} {amount / 1e9:.1f} GB" for axes, amount in sent]
    yield "each sends", ", ".join(told) or "nothing"
    pictures = f", {counts.images / seconds:,.0f} images/s" if counts.images else ""
    yield "speed", f"{counts.tokens / seconds:,.0f} tokens/s{pictures}"
    campaign = plan.campaign(num_steps)
    yield (
        f"{num_steps:,} steps",
        f"{campaign['hours']:,.1f} hours, {campaign['megawatt_hours']:,.1f} MWh at "
        f"{plan.watts:.0f} W a device",
    )
    for warning in time.warnings:
        if warning_matters(warning):
            yield "not sure", warning


def warning_matters(warning: str) -> bool:
    return not warning.endswith("e-05 s)") and not warning.endswith("e-06 s)")


def _parts(plan: Plan) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for title in ("part", "", "forward TFLOP", "backward TFLOP"):
        table.add_column(title, justify="right" if "TFLOP" in title else "left")
    for part, (forward, backward) in plan.flops.items():
        state = "trains" if part in plan.trains else "frozen"
        table.add_row(part, state, f"{forward / 1e12:,.0f}", f"{backward / 1e12:,.0f}")
    return table


def _cells(plan: Plan) -> tuple[str, ...]:
    fast = plan.seconds is not None
    return (
        mesh_text(plan.mesh),
        plan.saved,
        f"{plan.counts.slots:,}",
        str(plan.accumulate),
        f"{plan.memory.peak / GIB:.1f}",
        f"{plan.seconds:.3g}" if fast else "too large",
        f"{plan.utilisation:.1%}" if fast else "",
        f"{plan.counts.tokens / plan.seconds:,.0f}" if plan.seconds else "",
    )
