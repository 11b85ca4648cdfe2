"""The method, in torch alone: what is predicted, how it is written and taken back, and what is remembered."""
