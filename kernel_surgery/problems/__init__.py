"""Texts for the models: maths problems in seven languages, their wordings, and neutral sentences."""
