"""What users do, each in a script: python -m examples.cnn, .vision_transformer, .sentence_encoder, .language_model."""
