"""A sparse autoencoder of a served chat model, over real chat traffic: trained, measured, its watched rows written."""
