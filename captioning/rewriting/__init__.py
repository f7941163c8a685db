"""Short prompts made long, as the captions that models are trained on."""
