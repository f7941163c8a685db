"""The model: what it is asked and answers, its server, and the conversation with it."""
