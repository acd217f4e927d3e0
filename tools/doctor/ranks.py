"""What every rank of the job computes, copies, sums and writes, and who stands out (engine/parallel/preflight.py)."""

from pathlib import Path

from engine.parallel.device import Device
from engine.parallel.mesh import Mesh
from engine.parallel.preflight import Finding, look_over
from tools.doctor.rows import NOTE, OK, WRONG, Row


def rank_rows(mesh: Mesh, device: Device, folder: Path | None = None) -> list[Row]:
    """Collective over the mesh; every rank gets the rows. folder: whose disk is measured."""
    return [row_of(finding) for finding in look_over(mesh, device, folder)]


def row_of(finding: Finding) -> Row:
    """A finding as a line of the report."""
    if finding.wrong:
        return Row(finding.what, f"wrong numbers on {finding.wrong}", WRONG, "take these devices out of the job")
    return Row(finding.what, finding.found, NOTE if finding.advice else OK, finding.advice)
