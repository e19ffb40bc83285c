"""Second-order solvers for rectified-flow models, registered with `maisi` as `ab2` and `heun`."""

from maisi_cli import hookimpl
from maisi_cli.hookspecs import Register


@hookimpl
def register_samplers(register: Register) -> None:
    """Register both solvers by name; they are imported when one is used."""
    register("ab2", "maisi_solvers.solvers:adams_bashforth_2", summary="Adams-Bashforth 2, one evaluation per step")
    register("heun", "maisi_solvers.solvers:heun", summary="Heun, two evaluations per step")
