"""Other people's quantizers, run on our checkpoints and landing in our checkpoint format."""
