"""Programs as `compiled.as_text()` writes them for a TPU, with as much as the model reads."""

HEADER = "HloModule jit_step, is_scheduled=true, num_partitions={partitions}\n"


def cycles(count: int) -> str:
    return f', backend_config={{"window_config":{{"estimated_cycles":"{count}"}}}}'


def program(*lines: str, partitions: int = 8, before: str = "") -> str:
    """The lines are those of the entry computation; `before` holds others."""
    body = "\n".join(f"  {line}" for line in lines)
    entry = f"ENTRY %main (x: f32[8]) -> f32[8] {{\n{body}\n}}\n"
    return HEADER.format(partitions=partitions) + "\n" + before + entry


def computation(name: str, *lines: str) -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"%{name} (x: (s32[], f32[8])) -> (s32[], f32[8]) {{\n{body}\n}}\n\n"


def loop(*lines: str, begin: int = 0, bound: int = 8, step: int = 1, direction: str = "LT") -> str:
    """A program whose entry runs the lines in a loop."""
    pair = "(s32[]{:T(128)}, f32[8]{0:T(128)S(1)})"
    of_pair = "s32[]{:T(128)} get-tuple-element(%p), index=0"
    condition = computation(
        "condition",
        f"%p = {pair} parameter(0)",
        f"%i = {of_pair}",
        f"%bound = s32[]{{:T(128)}} constant({bound})",
        f"ROOT %test = pred[]{{:T(512)}} compare(%i, %bound), direction={direction}",
    )
    body = computation(
        "body",
        f"%p = {pair} parameter(0)",
        f"%i = {of_pair}",
        "%x = f32[8]{0:T(128)S(1)} get-tuple-element(%p), index=1",
        *lines,
        f"%step = s32[]{{:T(128)}} constant({step})",
        "%i.copy = s32[]{:T(128)S(6)} copy(%i)",
        "%next = s32[]{:T(128)} add(%i.copy, %step)",
        f"ROOT %out = {pair} tuple(%next, %x)",
    )
    return program(
        "%x = f32[8]{0:T(128)} parameter(0)",
        f"%begin = s32[]{{:T(128)}} constant({begin})",
        "%begin.copy = s32[]{:T(128)} copy(%begin)",
        f"%start = {pair} tuple(%begin.copy, %x)",
        f"%while.1 = {pair} while(%start), condition=%condition, body=%body",
        "ROOT %y = f32[8]{0:T(128)} get-tuple-element(%while.1), index=1",
        before=condition + body,
    )
