"""The catalogue of metrics: the label, unit and section of every metric in the records.

The only such list: figures, the report page, tables and loggers take names and units from here.
"""

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Metric:
    """How a metric is shown.

    Args:
        label: its name in words.
        section: of the report page.
        unit: of the column ``value`` (and ``low`` and ``high``); empty for a number without one.
        bars: limits that error bars are cut at: with few Gram matrices they are wider than the range of CKA.
        live: name of its curves in loggers, before ``/<layer>``; ``{view}`` stands for a kind of manifold. Empty for
            metrics without a curve per layer, and for CKA and invariance, whose curves
            :mod:`ssl_geometry.report.live` names.

    Example:
        >>> Metric("Angle between polytopes", "neighbors", "degrees").axis
        'Angle between polytopes (degrees)'
    """

    label: str
    section: str
    unit: str = ""
    bars: tuple[float, float] | None = None
    live: str = ""

    @property
    def axis(self) -> str:
        """The label with its unit, as it stands on an axis."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


CKA_BARS = (-0.1, 1.1)
METRICS = {
    "train/loss": Metric("Training loss", "training"),
    "train/acc": Metric("Training accuracy", "training", "share"),
    "val/knn": Metric("Validation accuracy, 20-NN", "training", "share"),
    "val/acc": Metric("Validation accuracy, classifier", "training", "share"),
    "test/knn": Metric("Test accuracy, 20-NN", "training", "share"),
    "test/acc": Metric("Test accuracy, classifier", "training", "share"),
    "cka": Metric("CKA (unbiased)", "cka", bars=CKA_BARS),
    "max_cka": Metric("CKA of the most similar layer", "cka"),
    "max_cka_null": Metric("CKA of the most similar layer, images permuted", "cka"),
    "max_cka_p": Metric("p-value of the most similar layer's CKA", "cka"),
    "invariance": Metric("CKA of two augmented views", "invariance", bars=CKA_BARS),
    "class_cka": Metric("CKA with the classes", "invariance", bars=CKA_BARS, live="invariance/classes"),
    "ridge_probe": Metric("Accuracy of ridge regression", "probes", "share", live="probes/ridge"),
    "logistic_probe": Metric("Accuracy of logistic regression", "probes", "share", live="probes/logistic"),
    "online_probe": Metric("Accuracy of online probes", "probes", "share", live="probes/online"),
    "neighbors": Metric("NNK neighbours", "neighbors", "count", live="neighbors/{view}/neighbors"),
    "diameter": Metric("Diameter of the NNK polytope", "neighbors", live="neighbors/{view}/diameter"),
    "affinity": Metric("Affinity of neighbouring polytopes", "neighbors", live="neighbors/{view}/affinity"),
    "affinity_random": Metric("Affinity of random polytopes", "neighbors"),
    "angle": Metric("Angle between neighbouring polytopes", "neighbors", "degrees", live="neighbors/{view}/angle"),
    "angle_random": Metric(
        "Angle between random polytopes", "neighbors", "degrees", live="neighbors/{view}/angle_random"
    ),
    "mutual_knn": Metric("Shared nearest neighbours", "neighbors", "share", live="neighbors/{view}/mutual_knn"),
    "purity": Metric("Neighbours of the same class", "neighbors", "share", live="neighbors/purity"),
    "degree": Metric("Neighbours", "neighbors", "count"),
    "hubness": Metric("Hubness (skewness of in-degrees)", "neighbors", live="neighbors/hubness"),
    "reciprocal": Metric("Edges that go both ways", "neighbors", "share"),
    "components": Metric("Connected components", "neighbors", "count"),
    "largest_component": Metric("Images in the largest component", "neighbors", "share"),
    "kept_since_last": Metric(
        "Neighbours kept since the previous measurement", "neighbors", "share", live="neighbors/kept_since_last"
    ),
    "nnk_jaccard": Metric("Jaccard overlap of NNK neighbours", "neighbors", "share"),
    "nnk_residual": Metric("Residual of NNK", "neighbors"),
    "two_nn": Metric("Intrinsic dimension (TwoNN)", "neighbors", "dimensions", live="neighbors/two_nn"),
    "levina_bickel": Metric("Intrinsic dimension (Levina-Bickel)", "neighbors", "dimensions"),
    "rankme": Metric("RankMe", "spectra", "dimensions", live="spectrum/rankme"),
    "lidar": Metric("LiDAR", "spectra", "dimensions", live="spectrum/lidar"),
    "effective_rank": Metric("Effective rank", "spectra", "dimensions", live="spectrum/effective_rank"),
    "participation_ratio": Metric("Participation ratio", "spectra", "dimensions", live="spectrum/participation_ratio"),
    "alpha_req": Metric("Decay of the spectrum (alpha-ReQ)", "spectra", live="spectrum/alpha_req"),
    "alpha_req_fit": Metric("R² of the decay (alpha-ReQ)", "spectra", live="spectrum/alpha_req_fit"),
    "alignment": Metric("Alignment", "spectra", live="spectrum/alignment"),
    "uniformity": Metric("Uniformity", "spectra", live="spectrum/uniformity"),
    "mean_cosine": Metric("Mean cosine of two images", "spectra", live="spectrum/mean_cosine"),
}
DERIVED = {
    r"(.+)_std": ("{}, standard deviation over images", None, ""),
    r"(.+)_quantile": ("{}, quantiles over images", None, ""),
    r"(.+)_mean_per_class": ("{}, mean over classes", None, "{}_mean_per_class"),
    r"(.+_probe)_l2": ("{}: lambda", "", "{}_l2"),
    r"(.+_probe)_learning_rate": ("{}: learning rate", "", "probes/learning_rate"),
    r"(.+_probe)_weight_decay": ("{}: weight decay", "", "probes/weight_decay"),
    r"(.+_probe)_gradient_norm": ("{}: norm of the gradient", "", ""),
    r"nnk_(.+)": ("{}, NNK graph", None, ""),
    r"(val/.+)_(?:bf16|16)-mixed": ("{}, mixed precision", None, ""),
}
"""Pattern of names that derive from another metric; their label, unit (None: the other's), and name of live curves."""
FAMILIES = {
    "training": r"(train|val|test)/.*",
    "probes": r"(linear|logistic|ridge|knn|labels_|finetune_).*|.*_probe_.*",
}
"""Section to the pattern of names that cannot be listed: of a user's own method, ``knn20``, ``labels_1%``."""


def described(metric: str) -> Metric:
    """Label, section and unit of a metric; a name that the catalogue does not know is its own label.

    Example:
        >>> described("angle_std").axis
        'Angle between neighbouring polytopes, standard deviation over images (degrees)'
        >>> described("tomorrow")
        Metric(label='tomorrow', section='other', unit='', bars=None, live='')
    """
    if metric in METRICS:
        return METRICS[metric]
    for pattern, (label, unit, live) in DERIVED.items():
        if (found := re.fullmatch(pattern, metric)) and found[1] in METRICS:
            base = METRICS[found[1]]
            own = base.unit if unit is None else unit
            return replace(base, label=label.format(base.label), unit=own, live=base.live and live.format(base.live))
    section = next((name for name, pattern in FAMILIES.items() if re.fullmatch(pattern, metric)), "other")
    return Metric(metric, section)
