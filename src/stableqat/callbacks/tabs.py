"""What TensorBoard's HParams and Custom Scalars tabs show of a run.

HParams takes its list of columns from one run of all that it shows, whichever it finds first, sorts them
(first those marked as differing, then by name) and ticks five. So every run lists what runs are compared by,
also where it has no such setting, and marks these five. Custom Scalars merges the layouts of all runs.
"""

from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

COMPARED_BY = {"method": "", "bits": 0.0, "grid": "", "lr": 0.0, "seed": 0.0}  # each with a value of its type
# the title of each chart, and a regular expression for its tags
LOSSES = {"validation": "^val/loss$", "training": "^train/loss$"}
TOP1 = {"validation top-1": "^val/top1$"}
TRAINING = {"gradient norm": "^train/grad_norm$", "learning rate": "^lr-"}
QUANTIZERS = {
    "codes that flip per step": "^quant/flip_rate$",
    "codes that flip back per step": "^quant/oscillation$",
    "weights that oscillate, or are frozen": "^quant/(oscillating|frozen)$",
    "drift of the scales": "^quant/scale_drift$",
    "signal to noise (dB)": "^quant/snr_db$",
}


def write_settings(
    logger: TensorBoardLogger, settings: dict[str, Any], metrics: dict[str, float], step: int
) -> None:
    """Write a run's settings and its metrics for the HParams tab.

    Args:
        logger: The run's logger, in the process that writes.
        settings: Flat settings.
        metrics: What the tab shows beside them, by tag.
        step: Where training is.
    """
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard.summary import hparams

    logger.log_hyperparams(settings, {})  # for hparams.yaml; it would list this run's own columns alone
    logger.log_metrics(metrics, step)
    settings = logger._sanitize_params(settings)
    columns, *_ = hparams(COMPARED_BY | settings, metrics)
    _, start, end = hparams(settings, metrics)
    plugin = columns.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(plugin.content)
    for column in data.experiment.hparam_infos:
        column.differs = column.name in COMPARED_BY
    plugin.content = data.SerializeToString()
    for summary in (columns, start, end):
        logger.experiment._get_file_writer().add_summary(summary, step)


def write_layout(logger: TensorBoardLogger, *, images: bool, quantized: bool, step: int) -> None:
    """Write a run's charts for the Custom Scalars tab, losses first.

    Args:
        logger: The run's logger, in the process that writes.
        images: Whether the run logs top-1.
        quantized: Whether it logs what quantizers do.
        step: Where training is.
    """
    from torch.utils.tensorboard.summary import custom_scalars

    categories = {"Loss": LOSSES | TOP1 if images else LOSSES, "Training": TRAINING}
    categories |= {"Quantizers": QUANTIZERS} if quantized else {}
    layout = {
        category: {title: ["Multiline", [tags]] for title, tags in charts.items()}
        for category, charts in categories.items()
    }
    logger.experiment._get_file_writer().add_summary(custom_scalars(layout), step)
