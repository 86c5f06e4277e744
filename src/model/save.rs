//! A fully trained model back into a Hugging Face folder.

use super::Model;
use super::weights::to_bytes;
use crate::error::{Error, Result};
use crate::io::atomic::write_file;
use crate::io::safetensors::{Dtype, SafetensorsWriter, TensorSpec};
use std::collections::BTreeMap;
use std::path::Path;

/// Writes `config.json` as it was read and every trained tensor in `dtype` into `folder`, which exists.
///
/// # Errors
/// [`Error::Config`] if the model is not fully trained (an adapter is saved by [`crate::lora::peft::save`]);
/// [`Error::Io`].
pub fn save(model: &Model, folder: &Path, dtype: Dtype) -> Result<()> {
    if model.llama.nbytes() > 0 || model.params.all().is_empty() {
        return Err(Error::config(
            "save",
            "model",
            "was not loaded with full_finetuning=True; save its adapter instead",
        ));
    }
    let params = model.params.all();
    let specs: Vec<_> =
        params.iter().map(|p| TensorSpec { name: p.name.clone(), dtype, shape: p.shape.clone() }).collect();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut writer = SafetensorsWriter::create(folder.join("model.safetensors"), &specs, &metadata)?;
    for param in params {
        writer.write(&param.name, &to_bytes(&param.data, dtype))?;
    }
    writer.finish()?;
    let mut config = model.config.json.clone();
    // transformers 5 says "dtype", earlier versions "torch_dtype".
    let key = if config["dtype"].is_null() { "torch_dtype" } else { "dtype" };
    config[key] = match dtype {
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        _ => "float32",
    }
    .into();
    let text = serde_json::to_vec_pretty(&config).expect("JSON values always serialise");
    write_file(folder.join("config.json"), &text)?;
    let generation = model.folder.join("generation_config.json");
    if generation.exists() && model.folder != folder {
        let text = std::fs::read(&generation).map_err(|e| Error::io(&generation, e))?;
        write_file(folder.join("generation_config.json"), &text)?;
    }
    Ok(())
}
