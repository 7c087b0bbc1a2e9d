"""What a traced function computes."""

from collections.abc import Iterator
from typing import Any

import jax.extend


def equations(jaxpr: Any) -> Iterator[Any]:
    """Those of inner functions too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)
