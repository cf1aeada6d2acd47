"""fit, validate, test: LightningCLI with this suite's defaults and one-line errors."""

import errno
import logging
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import LearningRateMonitor, RichProgressBar
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

import stableqat.data.image
import stableqat.data.text  # makes the classes known by their short names
from stableqat import callbacks
from stableqat.callbacks.interruption import EXIT_CODE
from stableqat.callbacks.refused import check_trainer
from stableqat.checkpoints.names import TOKENIZER
from stableqat.cli import checks
from stableqat.cli.arguments import CALLBACKS
from stableqat.cli.help import describe
from stableqat.cli.inherit import inherit
from stableqat.cli.messages import OneLineErrors, user_error
from stableqat.cli.progress import TrainingProgress
from stableqat.cli.resume import differences, find_resumed, saved_model
from stableqat.cli.run_folder import check_run_folder, claimed
from stableqat.cli.sizing import choose
from stableqat.cli.summary import Summary, say_the_end
from stableqat.cli.trainer import Trainer
from stableqat.data.tokenizer import keep_tokenizer
from stableqat.errors import UserError, first_line
from stableqat.files import whole_file
from stableqat.modules import QATModule
from stableqat.modules.parallel import register_strategies
from stableqat.modules.start import Start, check_start, state_dict_follows
from stableqat.modules.start_quantizers import check_quantizers
from stableqat.trust import QUANTIZERS, check_settings, wall

logger = logging.getLogger(__name__)

LOGGERS = {"stableqat": "stableqat: %(message)s", "lightning": "%(message)s"}


def run(arguments: list[str]) -> int:
    """Run fit, validate or test.

    Args:
        arguments: The verb and its flags.

    Returns:
        0 once the run has ended; a diverged run counts as ended.

    Raises:
        UserError: A one-line message.
    """
    _configure_logging()
    register_strategies()
    with wall(), stableqat.data.image.reads_once():
        QATCommand(arguments)
    return 0


class Parser(OneLineErrors, LightningArgumentParser):  # type: ignore[misc]
    """LightningCLI's parser with one-line errors; refuses untrusted classes in files."""

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parse a configuration whose classes are trusted."""
        with suppress(OSError, UnicodeDecodeError, yaml.YAMLError):  # the parser says what is wrong
            check_settings(yaml.safe_load(Path(path).read_text()), str(path))
        return super().parse_path(path, *args, **kwargs)

    def parse_args(self, args: Any = None, *others: Any, **kwargs: Any) -> Any:
        """Parse arguments; jsonargparse alone hands the null of a flag to an inner parser as None."""
        if not self.exit_on_error:
            args = [re.sub("=None$", "=null", arg) for arg in args]
        return super().parse_args(args, *others, **kwargs)

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """Write settings; jsonargparse alone takes a mapping of factories, and null in it, for a factory."""
        with warnings.catch_warnings():  # so that its union takes the next type
            warnings.filterwarnings("error", message=r"\s*Unable to serialize instance (\{|None)")
            return super().dump(*args, **kwargs)


class QATCommand(LightningCLI):
    """LightningCLI in subclass mode, with this suite's callbacks, logger and checks."""

    def __init__(self, arguments: list[str]) -> None:
        self._verb, self._arguments = arguments[0], arguments
        # a strategy of several processes starts the others with this command line
        argv, sys.argv = sys.argv, [sys.argv[0], *arguments]
        try:
            super().__init__(
                QATModule,
                L.LightningDataModule,
                save_config_callback=RunConfig,
                trainer_class=Trainer,
                parser_class=Parser,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                seed_everything_default=0,
                trainer_defaults={
                    "use_distributed_sampler": False,
                    "enable_model_summary": False,
                    "callbacks": [
                        LearningRateMonitor("step"),
                        callbacks.RunRecord(),
                        callbacks.Interruption(),
                    ],
                    "logger": {
                        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                        "init_args": {
                            "save_dir": "lightning_logs",
                            "name": "run",
                            "default_hp_metric": False,
                        },
                    },
                },
            )
        finally:
            sys.argv = argv

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Build only the verb's own parser: each takes a second."""
        return {self._verb: LightningCLI.subcommands()[self._verb]}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> Any:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        describe(parser, subcommand)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add this suite's configurable callbacks, each under its own key."""
        for key, name in CALLBACKS.items():
            parser.add_lightning_class_args(getattr(callbacks, name), key)

    def _parse_ckpt_path(self) -> None:
        """Name the settings that a checkpoint replaces; Lightning replaces them silently."""
        settings = self.config[self._verb]
        settings.ckpt_path = find_resumed(settings)
        if settings.ckpt_path is None:
            return
        configured, path = settings.model, settings.ckpt_path
        if (spec := saved_model(Path(path), configured)) is None:
            return
        replaced = self.config.clone()
        for key in QUANTIZERS:  # the parser would mix a class and a mapping
            replaced.pop(f"{self._verb}.model.init_args.{key}")
        try:
            self.config = self.parser.parse_object({self._verb: {"model": spec}}, replaced)
        except UserError as error:
            raise UserError(f"ckpt_path: {path} is of another model: {error}") from error
        for key, mine, saved in differences(configured, self.config[self._verb].model):
            if self._verb == "fit" or key == "model.class_path":
                raise UserError(
                    f"ckpt_path: {key} is {saved} in the checkpoint, {mine} in the configuration; resume "
                    "with the run's own config.yaml, or start a new run with model.init_from"
                )
            logger.warning("%s: %s from the checkpoint replaces %s from the configuration", key, saved, mine)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Check settings that need no model."""
        super().parse_arguments(parser, args)
        settings = self.config[self._verb]
        checks.check_groups(settings, ["trainer", *self._parser(self._verb).callback_keys])
        checks.check_seed(settings.seed_everything)
        checks.check_trainer(settings.trainer)
        if self._verb == "fit":
            checks.check_tasks(settings, self._arguments)

    def before_instantiate_classes(self) -> None:
        """Fill settings from the model's start, choose what is left open, and check what came of it."""
        settings = self.config[self._verb]
        self._inherited = [*inherit(settings), *choose(settings)]
        checks.check_types(settings)

    def instantiate_classes(self) -> None:
        """Build all; a mistake that a class finds in its settings comes wrapped and is unwrapped."""
        try:
            super().instantiate_classes()
        except MisconfigurationException as error:  # Lightning's name for a mistake in the settings
            raise UserError(f"{first_line(error)}; correct this setting") from error
        except ValueError as error:
            if cause := user_error(error):
                raise UserError(str(cause)) from error
            raise

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the trainer; whatever it refuses is a setting."""
        settings = self._get(self.config_init, "trainer")
        given = settings["callbacks"] if isinstance(settings["callbacks"], list) else [settings["callbacks"]]
        # before those that measure: it says first what the run is
        kwargs["callbacks"] = [Summary(), *(callback for callback in given if callback is not None)]
        if settings["enable_progress_bar"] in (None, True) and not any(
            isinstance(callback, AnyProgressBar) for callback in given
        ):
            bar = TrainingProgress() if self._verb == "fit" else RichProgressBar()
            self.trainer_defaults["callbacks"].append(bar)
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError, ModuleNotFoundError) as error:
            raise UserError(f"trainer: {first_line(error)}; correct this setting") from error

    def after_instantiate_classes(self) -> None:
        """Check what needs the model, but no data."""
        ckpt_path = self.config[self._verb].ckpt_path
        if self.trainer.log_dir is not None:
            check_run_folder(self.trainer.log_dir, ckpt_path)
        if self._verb == "fit":
            checks.check_optimizer(self.model, self.trainer)
        if ckpt_path is None:
            start = None if self.model.init_from is None else Start(self.model.init_from)
            if start is not None:
                check_start(self.model, start)
            if self.model.init_quantizers == "start":
                check_quantizers(self.model, start)
        check_trainer(self.trainer)
        self.model.check_data(self.datamodule)

    def _run_subcommand(self, subcommand: str) -> None:
        _set_level(logging.INFO)
        if self.trainer.is_global_zero:
            for line in self._inherited:
                logger.info(line)
        try:
            settings = self.config[subcommand]
            with ExitStack() as stack:
                if subcommand == "fit" or settings.ckpt_path is None:  # others only read
                    stack.enter_context(claimed(self.trainer, settings))
                stack.enter_context(_together(self.trainer))
                stack.enter_context(state_dict_follows(bool(settings.ckpt_path)))
                super()._run_subcommand(subcommand)
        except SIGTERMException as stop:
            if self.trainer.is_global_zero:
                step = self.trainer.global_step
                logger.warning("stopped at step %d; resume with the same command and --ckpt_path last", step)
            stop.code = EXIT_CODE
            raise
        except SystemExit as stop:
            if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning makes 1 of Ctrl-C
                raise stop.__context__ from None
            raise
        except MisconfigurationException as error:
            raise UserError(f"{first_line(error)}; correct this setting") from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
                raise
            where = error.filename or self.trainer.log_dir
            raise UserError(
                f"{where}: the disk refuses to write ({error.strerror}); free some space and resume with "
                "--ckpt_path last"
            ) from error
        except ValueError as error:
            # Lightning's message begins with the setting that does not fit the data
            named = re.match(r"\s*`(\w+)`", str(error))
            if named is None or named[1] not in self.config[subcommand].trainer:
                raise
            raise UserError(f"trainer.{named[1]}: {first_line(error)}") from error

    def after_fit(self) -> None:
        """Say what came of it, and what comes next."""
        say_the_end(self.trainer, self.model)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}


@contextmanager
def _together(trainer: L.Trainer) -> Iterator[None]:
    """After a failure, end the processes that this one started: they would wait for it, or report errors."""
    try:
        yield
    except Exception:
        if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
            trainer.strategy.launcher.kill(signal.SIGKILL)
        raise


class RunConfig(SaveConfigCallback):
    """Save the resolved configuration and the tokenizer, unless a resumed run has them."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write what is missing."""
        log_dir = trainer.log_dir  # a broadcast: all processes must ask
        if self.already_saved or log_dir is None:
            return
        self.already_saved, path = True, Path(log_dir) / self.config_filename
        if trainer.is_global_zero and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            if (tokenizer := getattr(getattr(trainer, "datamodule", None), "tokenizer", None)) is not None:
                keep_tokenizer(tokenizer, path.parent / TOKENIZER)
            with whole_file(path) as part:
                self.parser.save(self.config, part, skip_none=False, multifile=False)


def _configure_logging() -> None:
    for part in ("lightning.pytorch", "lightning.fabric"):  # have handlers of their own
        logging.getLogger(part).handlers.clear()
        logging.getLogger(part).propagate = True
        logging.getLogger(part).setLevel(logging.NOTSET)
    for name, form in LOGGERS.items():
        handler = logging.StreamHandler()  # new each time: stderr may have been replaced
        handler.setFormatter(logging.Formatter(form))
        # the exception itself is reported when it arrives
        handler.addFilter(lambda record: "was raised with message" not in record.getMessage())
        logging.getLogger(name).handlers[:] = [handler]
    _set_level(logging.WARNING)
    # advice about worker counts and log intervals, and what is known here
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*The dirpath has changed from.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")


def _set_level(level: int) -> None:
    """Warnings alone until the run begins, then news too."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(level)
