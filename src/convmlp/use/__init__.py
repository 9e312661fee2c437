"""What a person does with a trained classifier: open it, predict, visualise, export, describe."""
