"""What `--help` says beside the options."""

from lit_fanions import callbacks
from lit_fanions.cli.messages import PROGRAM

EXAMPLES = f"""\
examples:
  {PROGRAM} fit --config configs/quickstart.yaml
  {PROGRAM} fit --config configs/airbench/muon.yaml --config configs/cpu.yaml
  {PROGRAM} fit --config RECIPE.yaml --model.optimizer.matrix.lr 0.03 --trainer.max_epochs 4
  {PROGRAM} fit --config RECIPE.yaml --trainer.callbacks.SpectralMonitor.every_n_steps 10
  {PROGRAM} fit --config RECIPE.yaml --ckpt_path LOGS/checkpoints/last.ckpt
  {PROGRAM} test --config RECIPE.yaml --ckpt_path LOGS/checkpoints/last.ckpt
  {PROGRAM} params --config RECIPE.yaml
  {PROGRAM} list
  {PROGRAM} report LOGS
  {PROGRAM} fit --model.help models.Airbench

callbacks of this package (--trainer.callbacks+ CLASS, --help: fit --trainer.callbacks.help CLASS):
  {", ".join(f"lit_fanions.callbacks.{name}" for name in callbacks.__all__)}

Later files and options win over earlier ones. `fit --print_config` shows the result."""

SUBCOMMANDS = {
    "fit": "Train.",
    "validate": "Evaluate a checkpoint on the validation set.",
    "test": "Evaluate a checkpoint on the test set.",
    "predict": "Save the predictions of a checkpoint.",
    "params": "Show which algorithm trains which parameter, and why.",
}

SECTIONS = {
    "trainer": "trainer: how to run, the options of Lightning's Trainer",
    "model": "model: what to train, any LightningModule",
    "data": "data: what to train on, any LightningDataModule",
}

SUBCOMMAND_USAGE = "%(prog)s --config FILE [--config FILE ...] [--OPTION VALUE ...]"
