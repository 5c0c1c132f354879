"""Train a language model with KTO from binary feedback.

python examples/nlp/kto/train_gpt_kto.py \
    pretrained_checkpoint.restore_from_path=<Hugging Face folder> \
    'model.data.data_prefix={train: [train.jsonl], validation: [validation.jsonl]}' \
    trainer.devices=2 model.tensor_model_parallel_size=2

Every key is in conf/gpt_kto.yaml and explained in docs/configuration.md.
"""

# Nothing heavy at module level: Megatron's checkpoint writer starts processes that import this file again.
import sys
from pathlib import Path

if __name__ == "__main__":
    # a clone works without being installed, and its edits count where another version is
    sys.path.insert(1, str(Path(__file__).resolve().parents[3]))

    from nemo_kto.stopping import take_signals

    take_signals()  # before anything else: what comes next takes seconds

    from nemo_kto.cli import run_script

    run_script("train", sys.argv[1:])
