"""The KTO step: scoring on Megatron's schedule, the reference policy, the baseline, the objective.

Imports `weights` and what is below it. Start with `megatron_gpt_kto_model.py`, whose docstring has the step's order.
"""
