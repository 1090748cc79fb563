"""What is compressed: translation models, a language model, plain tables."""
