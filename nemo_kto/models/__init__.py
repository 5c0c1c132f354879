"""Megatron models, their Hugging Face weights, the reference policy and the KTO model."""
