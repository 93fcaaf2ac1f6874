"""The studio page, made with Gradio: one module per tab."""
