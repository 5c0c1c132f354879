"""Train a language model with KTO from binary feedback.

python examples/nlp/kto/train_gpt_kto.py \
    pretrained_checkpoint.restore_from_path=<Hugging Face folder> \
    'model.data.data_prefix={train: [train.jsonl], validation: [validation.jsonl]}' \
    trainer.devices=2 model.tensor_model_parallel_size=2

Every key is in conf/gpt_kto.yaml and explained in docs/configuration.md.
"""

# Only the standard library at module level: Megatron's checkpoint writer starts a process that imports this file again.
from nemo_kto.quiet import silence_startup_noise

if __name__ == "__main__":
    silence_startup_noise()

    from nemo_kto.cli import run_guarded
    from nemo_kto.hydra_app import main

    run_guarded(main)
