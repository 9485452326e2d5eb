"""The network and its tokenizer behind one forward method."""
