"""More solvers for rectified-flow models, registered with `maisi` as `ab3` and `midpoint`."""

from maisi_cli import hookimpl
from maisi_cli.hookspecs import Register


@hookimpl
def register_samplers(register: Register) -> None:
    """Register both solvers by name; they are imported when one is used."""
    register("ab3", "maisi_solvers.solvers:adams_bashforth_3", summary="Adams-Bashforth 3, one evaluation per step")
    register("midpoint", "maisi_solvers.solvers:midpoint", summary="the midpoint rule, two evaluations per step")
