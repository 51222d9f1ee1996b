"""The commands that take an experiment: fit, validate, evaluate, sample, plan.

Built on LightningCLI: an experiment YAML names classes by ``class_path`` and their arguments, every
key is checked against a signature, and any of them can be overridden on the command line.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, cast

import lightning.pytorch as pl
import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from callbacks import Preemption, Progress
from fewstep.errors import FewstepError, nearest
from fewstep.guidance import Guidance
from fewstep.guidance.noise import NoiseOptimisation
from lightning_modules import FewStepModule
from lightning_modules.parallel import ShardedStrategy
from lightning_modules.whole import WholeCheckpointIO
from scripts.config_errors import explain, reasons_within
from scripts.experiments import expand_arguments, expand_steering
from scripts.failures import earlier, in_one_line
from scripts.launcher import watch_ranks
from scripts.loggers import MetricsCSV
from scripts.report.data import flatten
from scripts.runs import place, refuse_disagreement
from scripts.tensorboard import TensorBoard
from scripts.trainer import FewstepTrainer
from scripts.trainer_options import HERE, asked_for, check_devices, check_options
from scripts.unbegun import discarded_unless_begun

QUIET = (
    r".*isinstance\(treespec.*",
    r".*module\(s\) in eval mode.*",
    r".*does not have many workers.*",
    r".*`srun` command is available.*",
    r".*is an iterable.*dataset.*",
    r".*litlogger.*",
    r".*smaller than the logging interval.*",
    r".*overridden after .* initialization.*",
    r".*ambiguous collection.*",
    r".*lr_scheduler.step\(\).*",
)

# Where Lightning's own words speak of what is not done here.
CHECKPOINT_HELP = {
    "fit": "'last' goes on with the newest run; or a checkpoint file or a run's folder.",
    "validate": "Checkpoint file or run folder; the experiment's newest by default.",
}
LOGGER_PACKAGES = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow"}
RUN_VERSION = "FEWSTEP_RUN_VERSION"


def quieten() -> None:
    """Silences messages that tell a user of fewstep nothing."""
    for pattern in QUIET:
        warnings.filterwarnings("ignore", message=pattern)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)


class Parser(LightningArgumentParser):
    """A parser whose errors are one readable message."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises what is wrong with the configuration as a FewstepError.

        The parsers jsonargparse makes for nested classes keep their own way: their messages are
        parts of the outermost one.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        text = explain(str(message))
        if unknown := re.match(r"unrecognized arguments: (--[^\s=]+)", str(message)):
            text = f"There is no option '{unknown[1]}'.{nearest(unknown[1], options_of(self))}"
        raise FewstepError(text) from ex


def options_of(parser: Any) -> list[str]:
    """The options of a parser and of its commands' parsers."""
    found = list(parser._option_string_actions)
    for action in parser._actions:
        choices = getattr(action, "choices", None)
        for one in choices.values() if isinstance(choices, dict) else ():
            found += options_of(one)
    return found


class SaveConfig(SaveConfigCallback):
    """Saves the resolved configuration into the run's folder and tells it to the loggers.

    A resumed run writes it anew.
    """

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Writes ``config.yaml``; called on the first rank only."""
        if trainer.state.fn != "fit":
            return
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.yaml"
        self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=False)
        settings = flatten(yaml.safe_load(path.read_text(encoding="utf-8")))
        for logger in trainer.loggers:
            logger.log_hyperparams(settings)


class FewstepCLI(LightningCLI):
    """LightningCLI with run folders, experiment defaults and fewstep's commands."""

    made_trainer: type[FewstepTrainer] = FewstepTrainer
    prog = "fewstep"

    def __init__(self, arguments: list[str]) -> None:
        quieten()
        self.command = arguments[0]
        steered, self.steering = expand_steering(arguments)
        expanded, self.experiment = expand_arguments(steered)
        # Of a dataclass's field any subclass, or a function that makes one, may be named.
        set_parsing_settings(subclasses_enabled=[Guidance, NoiseOptimisation])
        super().__init__(
            model_class=FewStepModule,
            datamodule_class=pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_class=self.made_trainer,
            trainer_defaults={"callbacks": [Progress(), Preemption()]},
            parser_class=Parser,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"prog": self.prog, "allow_abbrev": False},
            args=expanded,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command that was given and what it hides: parsers of all would take long to build."""
        hidden = {
            "fit": {"train_dataloaders", "val_dataloaders", "weights_only"},
            "validate": {"dataloaders", "weights_only", "verbose"},
        }
        return {self.command: {"model", "datamodule"} | hidden.get(self.command, set())}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds where the run is kept."""
        parser.add_argument("--run.dir", type=str, default="runs", help="Folder of all runs.")
        parser.add_argument(
            "--run.name",
            type=str | None,
            default=None,
            help="Experiment's folder below it; the experiment file's short name by default.",
        )
        parser.add_argument(
            "--run.version",
            type=str | None,
            default=None,
            help="This run's folder, such as version_0; by default a new one when training from "
            "the start, otherwise the newest.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, without LightningCLI's warning about arguments given from Python.

        Raises:
            FewstepError: for what is wrong in the configuration.
        """
        self.config = parser.parse_args(args)
        check_options(self.config[self.config.subcommand])

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        for action in parser._actions:
            if action.dest == "ckpt_path":
                action.help = CHECKPOINT_HELP.get(subcommand, action.help)
        return parser

    def _parse_ckpt_path(self) -> None:
        """Checkpoints do not change the configuration."""

    def instantiate_classes(self) -> None:
        """Builds all that is configured.

        Raises:
            FewstepError: in its own words what a class refused, which a parser that tried it as one
                of several types buries among what was wrong with the others; or if nodes might
                train in different folders.
        """
        config = self.config[self.subcommand]
        if self.subcommand == "fit" and not (config.run.version or _version_of_first_rank()):
            refuse_disagreement(self.run_dir, int(config.trainer.num_nodes))
        try:
            super().instantiate_classes()
        except ValueError as error:
            refused = next((e for e in earlier(error) if isinstance(e, FewstepError)), None)
            reasons = str(refused or reasons_within(str(error)))
            if not reasons:
                raise
            raise FewstepError(reasons) from error

    def before_instantiate_classes(self) -> None:
        """Decides on the run's folder and the checkpoint to start from."""
        config: Namespace = self.config[self.subcommand]
        check_loggers(config)
        foreign = config.get("samples") or config.get("pipeline")
        name = config.run.name or self.experiment or type_name(config)
        if foreign is not None:
            name = config.run.name or f"samples/{Path(foreign).resolve().name}"
        self.config[self.subcommand].run.name = name
        self.run_dir, self.checkpoint = Path(config.run.dir) / name, None
        if foreign is not None:
            self.run_dir = self.run_dir / (config.run.version or "version_0")
        elif self.subcommand != "plan":
            self.run_dir, self.checkpoint = place(
                self.run_dir,
                config.run.version or _version_of_first_rank(),
                config.get("ckpt_path"),
                training=self.subcommand == "fit",
                trained=config.trainer.max_steps != 0,
            )
            os.environ[RUN_VERSION] = self.run_dir.name
            if self.steering is not None:  # whose results are not those of the run itself
                name = f"{name}+{self.steering}"
                self.config[self.subcommand].run.name = name
                self.run_dir = Path(config.run.dir) / name / self.run_dir.name

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Adds the run's folder and loggers to the trainer."""
        trainer = self._get(self.config_init, "trainer", default={})
        if self.subcommand == "plan":
            # What is planned for need not be there.
            planner = cast(FewstepTrainer, super().instantiate_trainer(**HERE, **kwargs))
            planner.asked = asked_for(trainer)
            return planner
        loggers: Any = False
        if self.subcommand == "fit" and trainer.get("logger") is not False:
            loggers = [
                MetricsCSV(self.run_dir),
                TensorBoard(self.run_dir),
            ]
            extra = trainer.get("logger")
            if extra not in (None, True):
                loggers += extra if isinstance(extra, list) else [extra]
        check_devices(trainer)
        try:
            made = super().instantiate_trainer(
                logger=loggers, default_root_dir=str(self.run_dir), **kwargs
            )
        except ValueError as error:
            raise FewstepError(f"The trainer cannot be made so: {in_one_line(error)}") from error
        if not isinstance(made.strategy, ShardedStrategy):
            made.strategy.checkpoint_io = WholeCheckpointIO()  # reads those of sharded runs too
        watch_ranks(made.strategy)
        made.run_name = self.config[self.subcommand].run.name  # type: ignore[attr-defined]
        return made

    def _run_subcommand(self, subcommand: str) -> None:
        run = discarded_unless_begun(self.trainer, self.run_dir)
        with run if subcommand == "fit" else nullcontext():
            super()._run_subcommand(subcommand)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand != "plan":
            arguments["ckpt_path"] = None if self.checkpoint is None else str(self.checkpoint)
        if subcommand in ("fit", "validate"):
            arguments["weights_only"] = True
        return arguments


def _version_of_first_rank() -> str | None:
    """The run's folder that the process chose which started this one; None in that process."""
    return os.environ.get(RUN_VERSION) if os.environ.get("LOCAL_RANK", "0") != "0" else None


def check_loggers(config: Namespace) -> None:
    """Refuses a logger whose package is missing.

    Raises:
        FewstepError: says how to install it.
    """
    asked = str(config.get("trainer.logger"))
    for name, package in LOGGER_PACKAGES.items():
        if name in asked and find_spec(package) is None:
            raise FewstepError(
                f"trainer.logger is {name}, whose package {package} is not installed. Install it "
                f"with pip install 'fewstep[{package}]'."
            )


def type_name(config: Namespace) -> str:
    """A run's name when it was given no experiment file: its method's."""
    words = re.findall(r"[A-Z][a-z]+", config.model.class_path.rpartition(".")[2])
    return "_".join(words).lower()


def run_command(arguments: list[str]) -> FewstepCLI:
    """Runs one command in this process; what goes wrong is raised."""
    return FewstepCLI(arguments)
