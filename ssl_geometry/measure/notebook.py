"""Measuring in a notebook or a script: one call, a table, and its figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
from matplotlib.figure import Figure
from torch import nn

from ssl_geometry.data.views import View
from ssl_geometry.errors import UserError
from ssl_geometry.measure.cka import CKA, INITIAL
from ssl_geometry.measure.engine import measure_together, parts_of
from ssl_geometry.measure.measurement import ImageSource, Measurement, Occasion, check_measurements, check_source
from ssl_geometry.measure.processes import agreeing, this_process
from ssl_geometry.measure.subject import HOW_IT_SEES, Subject
from ssl_geometry.progress import progress_bar
from ssl_geometry.ranges import LONGEST_NAME, check_argument
from ssl_geometry.records import Protocol, RecordStore
from ssl_geometry.report.live import curve_rows, live_figures
from ssl_geometry.report.style import save_figure


@dataclass(repr=False)
class Measurements:
    """What was measured of a network.

    Args:
        rows: one per number, with the columns of the records (:data:`ssl_geometry.records.COLUMNS`).
        protocols: how the numbers came about.
    """

    rows: pd.DataFrame
    protocols: list[Protocol]

    def __repr__(self) -> str:
        metrics = ", ".join(self.rows["metric"].unique()) if len(self.rows) else "nothing"
        return f"Measurements of {len(self.rows):,} rows: {metrics}"

    def _repr_html_(self) -> str:
        return str(self.rows.to_html(max_rows=10, notebook=True))

    def draw(self, folder: str | Path | None = None) -> dict[str, Figure]:
        """The figures of all that was measured.

        Args:
            folder: where they are kept as PNG and PDF, if anywhere.

        Returns:
            Name to figure, such as ``cka/map_self``.
        """
        rows = self._records()
        figures = {name: draw() for name, draw in live_figures(rows, curve_rows(rows)).items()}
        if folder is not None:
            for name, figure in figures.items():
                save_figure(figure, Path(folder) / name.replace("/", "_"))
        return figures

    def save(self, folder: str | Path) -> None:
        """Keep the rows as Parquet with their protocols, which the report page and ``read_records`` read.

        Networks of several names may share a folder; of one name, what is saved later replaces what is there.
        """
        rows = self._records()
        names = sorted({row["model"] for row in rows})
        for name in names:
            part = f"measure/{quote(name, safe=' ')[:LONGEST_NAME]}"
            own = [row for row in rows if row["model"] == name]
            RecordStore(Path(folder) / "records").write(part, own, self.protocols)

    def _records(self) -> list[Any]:
        """The rows, None in what they do not have; a value that is not defined stays NaN."""
        has = self.rows.notna() | (self.rows.columns == "value")
        return self.rows.astype(object).where(has, None).to_dict("records")


def measure(
    network: nn.Module,
    images: ImageSource,
    measurements: Sequence[Measurement] | Measurement,
    *,
    clean: View | Callable[[Any], Any] | None = None,
    heads: Mapping[str, nn.Module] | None = None,
    references: Sequence[Subject] = (),
    name: str = "network",
) -> Measurements:
    """Measure a network once: the code, and the numbers, of training with a monitor.

    Args:
        network: any module whose forward takes images; on the device where it is to be measured.
        images: :class:`MeasurementImages`, or a data module of this package that is set up.
        measurements: such as ``[CKA("blocks"), Spectrum()]``, or one.
        clean: how the network sees an image: a view, or a transform from a PIL image to a tensor. Methods of this
            package know it.
        heads: name to module that reads the network's features, measured under that name.
        references: networks that CKA compares with.
        name: of the network, in the rows.

    Returns:
        The rows as a table, which draws.

    Raises:
        UserError: measurements that mean nothing for this network or these images.

    Example:
        >>> import torch
        >>> from ssl_geometry.measure import MeasurementImages
        >>> from ssl_geometry.models import build_backbone
        >>> images = MeasurementImages(torch.randint(0, 255, (64, 3, 32, 32), dtype=torch.uint8))
        >>> network = build_backbone("resnet10", width=0.25)
        >>> found = measure(network, images, [CKA(layers="stages", gram_size=16)], clean=View("none", size=32))
        >>> len(found.rows), list(found.draw())
        (16, ['cka/map_self'])
    """
    measurements = check_measurements(measurements)
    check_source(images)
    check_argument(str, name, "name")
    _check_references(references, measurements)
    if clean is None and not hasattr(network, "clean_view"):
        raise UserError(HOW_IT_SEES.format(type(network).__name__))
    if clean is None and not heads:
        subject = Subject.of(network, name)
    else:
        seen: Any = network.clean_view if clean is None else clean
        subject = Subject(network, seen, name=name, heads=heads, image_shape=images.image_shape)
    names = [name, INITIAL, *(reference.name for reference in references)]
    if twice := [other for number, other in enumerate(names) if other in names[:number]]:
        raise UserError(f"references: two networks are called {twice[0]!r}; name them apart: Subject(…, name=…)")
    for measurement in measurements:
        measurement.check(subject)
        measurement.prepare(subject, images)
        if isinstance(measurement, CKA):
            for reference in references:
                measurement.add_reference(reference, images, subject)
    asked = [request for measurement in measurements for request in measurement.requests(subject)]
    total = sum(len(images.loader(*part)) for part in parts_of(asked))
    with progress_bar(shown=this_process()[0] == 0, transient=True) as progress:
        task = progress.add_task(f"measuring {name}", total=total)
        found = measure_together(
            measurements, Occasion(subject, images, name), lambda: progress.advance(task), agreeing
        )
    rows = pd.DataFrame([row for measured in found for row in measured.rows])
    return Measurements(rows, [protocol for measured in found for protocol in measured.protocols])


def _check_references(references: Sequence[Subject], measurements: Sequence[Measurement]) -> None:
    ckas = [measurement for measurement in measurements if isinstance(measurement, CKA)]
    if any(cka.reference is not None for cka in ckas):
        raise UserError("CKA.reference: monitors of training read it; give measure(…, references=[Subject(…)])")
    if not isinstance(references, Sequence) or not all(isinstance(item, Subject) for item in references):
        raise UserError("references: expected a list of networks, such as [Subject(network, clean, name='other')]")
    if references and not ckas:
        raise UserError("references: CKA compares with them; add CKA() to the measurements, or leave them out")
