"""The subcommands of ``python -m rlhf_lightning`` and their exit codes.

A command's code is imported only when the command runs, so that ``--help`` and ``info`` answer at once.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence

from rlhf_lightning import __version__
from rlhf_lightning.cli.suggestions import did_you_mean
from rlhf_lightning.errors import InputError, ProcessFailed, TrainingDiverged, out_of_memory
from rlhf_lightning.text import printable

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
DONE, FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143

_TRAINING = "rlhf_lightning.cli.training"
_EXCHANGE = "rlhf_lightning.preferences.exchange"
_SEVERAL = (_TRAINING, _EXCHANGE)  # take the last word of the command as their first argument
# name of one or two words -> (module with main(argv) -> int, what --help says)
_COMMANDS = {
    "fit": (_TRAINING, "train: --config sft.yaml, reward_model.yaml, ppo.yaml, grpo.yaml, dpo.yaml, ..."),
    "validate": (_TRAINING, "the validation metrics of a model or a checkpoint"),
    "test": (_TRAINING, "the same metrics, called test/..., of the rows of data.val_path"),
    "predict": (_TRAINING, "answer prompts, one JSON line a prompt (--output FILE)"),
    "generate": ("rlhf_lightning.preferences.generate", "several answers of policies to each prompt, to be compared"),
    "evaluate": ("rlhf_lightning.evaluation.evaluate", "compare policies on held-out prompts: reward, KL, win rate"),
    "annotate": ("rlhf_lightning.preferences.annotate", "a local web page on which people judge answers"),
    "agreement": ("rlhf_lightning.evaluation.trust", "whether people agree, and what to do where they do not"),
    "preferences export": (_EXCHANGE, "judgements as rows to train on"),
    "preferences import": (_EXCHANGE, "pairs of other forms, TRL's and HH's, as our rows"),
    "data check": ("rlhf_lightning.data.check", "what is in preference files, and what is wrong with them"),
    "demo": ("rlhf_lightning.demo.main", "the whole pipeline on a small example, offline, in minutes"),
    "info": ("rlhf_lightning.cli.info", "versions, and which operators run natively here (--json)"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    0: done. 1: failed, for example by a loss that is not finite or by lack of memory. 2: the input is at fault, as one
    line says. 130 and 143: stopped by SIGINT and SIGTERM. Other errors are bugs of ours and keep their traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except InputError as error:
        _say_error(error)
        return BAD_INPUT
    except (TrainingDiverged, ProcessFailed) as error:
        _say_error(error)
        return FAILED
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        _say_error(error)
        return FAILED
    except OSError as error:
        if error.errno in _NO_ROOM:
            _say_error(OSError(f"{error.filename or 'output'}: cannot be written ({error.strerror}); make room"))
            return FAILED
        if error.errno != errno.ENAMETOOLONG:
            raise
        _say_error(InputError(f"{error.filename}: no file can have such a long name"))
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as stop:
        return _exit_code(stop)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return DONE if arguments else BAD_INPUT
    if arguments[0] == "--version":
        print(f"rlhf_lightning {__version__}")
        return DONE
    first, second = [*arguments, ""][:2]
    group = [name for name in _COMMANDS if name.startswith(f"{first} ")]
    if group and not second:
        raise InputError(f"{first}: which command? There is {' and '.join(group)}")
    if group and second in ("-h", "--help"):
        print("\n".join(f"usage: python -m rlhf_lightning {name} ..." for name in group))
        return DONE
    name = f"{first} {second}" if group else first
    if name not in _COMMANDS:
        hint = " (did you mean fit?)" if name == "train" else did_you_mean(name, _COMMANDS)
        raise InputError(f"unknown command {name!r}{hint}; --help lists the commands")
    module, _ = _COMMANDS[name]
    rest = arguments[len(name.split()) - (module in _SEVERAL) :]
    return int(importlib.import_module(module).main(rest))


def _help() -> str:
    commands = "\n".join(f"  {name:<20}{text}" for name, (_, text) in _COMMANDS.items())
    return f"""usage: python -m rlhf_lightning COMMAND [options]

From demonstrations to an aligned model: SFT, reward model, PPO, DPO, on PyTorch Lightning.

{commands}

  python -m rlhf_lightning fit --config ppo.yaml [--config fsdp.yaml] [--model.kl.coef 0.1] [--run NAME]
  python -m rlhf_lightning fit --config ppo.yaml [--run NAME] --ckpt_path last   continue that run, or the newest
  python -m rlhf_lightning COMMAND --help                                       the options of a command

--version prints the version. Exit codes: 0 done, 1 failed, 2 the input is at fault, 130 and 143 stopped by a signal."""


def _say_error(error: Exception) -> None:
    rank = os.environ.get("LOCAL_RANK", "0")
    prefix = "" if rank == "0" else f"[process {rank}] "
    # A message may quote a file or a model. Nothing in it may control the terminal.
    print(f"{prefix}error: {' '.join(printable(str(error)).split())}", file=sys.stderr, flush=True)


def _exit_code(stop: SystemExit) -> int:
    # Lightning turns Ctrl-C into exit(1) and SIGTERM into an exception with no code, which Python takes for success.
    if isinstance(stop.__context__, KeyboardInterrupt):
        return INTERRUPTED
    if type(stop).__name__ == "SIGTERMException":
        return TERMINATED
    if stop.code is None:
        return DONE
    return stop.code if isinstance(stop.code, int) else FAILED
