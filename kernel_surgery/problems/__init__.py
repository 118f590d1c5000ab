"""The maths problems in seven languages, their wordings, and neutral text."""
