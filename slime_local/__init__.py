"""slime's training contract on one machine: flags, data, rollout, engine, /generate server, trainer, checkpoints.

Nothing here knows which environment is being trained on: that arrives through slime's plug-in flags.
"""
