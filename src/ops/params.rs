//! The trainable tensors and their gradients, apart from the layers that use them.

use crate::error::{Error, Result};
use std::sync::atomic::{AtomicU64, Ordering};

/// Which parameter of a [`ParamStore`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParamId(pub usize);

/// One trainable tensor, f32, row-major.
#[derive(Clone, Debug)]
pub struct Param {
    /// Its name in the model, `model.layers.0.self_attn.q_proj.lora_A.weight`.
    pub name: String,
    /// Its axes.
    pub shape: Vec<usize>,
    /// Its values.
    pub data: Vec<f32>,
    /// Whether weight decay applies (not to norms and biases).
    pub decay: bool,
}

/// All trainable tensors of a model, in a fixed order.
#[derive(Clone, Debug, Default)]
pub struct ParamStore {
    params: Vec<Param>,
    state: u64,
}

/// The states that all stores have gone through: no two with other values share a number.
static STATES: AtomicU64 = AtomicU64::new(1);

impl ParamStore {
    /// Adds a tensor and returns its id.
    pub fn add(&mut self, name: String, shape: Vec<usize>, data: Vec<f32>, decay: bool) -> ParamId {
        debug_assert_eq!(shape.iter().product::<usize>(), data.len(), "{name}");
        self.change();
        self.params.push(Param { name, shape, data, decay });
        ParamId(self.params.len() - 1)
    }

    /// Tells the values of now from those before: what was computed from them holds while this number does.
    pub fn state(&self) -> u64 {
        self.state
    }

    fn change(&mut self) {
        self.state = STATES.fetch_add(1, Ordering::Relaxed);
    }

    /// The values of one tensor.
    pub fn get(&self, id: ParamId) -> &[f32] {
        &self.params[id.0].data
    }

    /// All tensors in order.
    pub fn all(&self) -> &[Param] {
        &self.params
    }

    /// All tensors in order, to be changed.
    pub fn all_mut(&mut self) -> &mut [Param] {
        self.change();
        &mut self.params
    }

    /// The tensor called `name`.
    pub fn find(&self, name: &str) -> Option<ParamId> {
        self.params.iter().position(|param| param.name == name).map(ParamId)
    }

    /// Number of trainable elements.
    pub fn n_elements(&self) -> usize {
        self.params.iter().map(|param| param.data.len()).sum()
    }

    /// Cuts a matrix to `rows` rows, or adds rows that all are `fill`, `[cols]`.
    pub fn resize_rows(&mut self, id: ParamId, rows: usize, fill: &[f32]) {
        self.change();
        let Param { shape, data, .. } = &mut self.params[id.0];
        let len = rows * fill.len();
        data.truncate(len);
        data.extend((data.len()..len).map(|at| fill[at % fill.len()]));
        shape[0] = rows;
    }

    /// Sets a row of a matrix, `[cols]`.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn set_row(&mut self, id: ParamId, row: usize, values: &[f32]) {
        self.change();
        self.params[id.0].data[row * values.len()..(row + 1) * values.len()].copy_from_slice(values);
    }

    /// Replaces the values of one tensor.
    ///
    /// # Errors
    /// [`Error::Shape`] if the sizes differ.
    pub fn set(&mut self, id: ParamId, values: &[f32]) -> Result<()> {
        self.change();
        let param = &mut self.params[id.0];
        if param.data.len() != values.len() {
            return Err(Error::Shape {
                op: "ParamStore::set",
                expected: format!("{:?} for {}", param.shape, param.name),
                got: vec![values.len()],
            });
        }
        param.data.copy_from_slice(values);
        Ok(())
    }
}

/// One gradient per parameter, summed over the micro-batches of an optimizer step.
#[derive(Default)]
pub struct Grads {
    grads: Vec<Vec<f32>>,
}

impl Grads {
    /// Zeros for every parameter.
    pub fn zeros(params: &ParamStore) -> Self {
        Self { grads: params.all().iter().map(|param| vec![0.0; param.data.len()]).collect() }
    }

    /// Sets every gradient to zero.
    pub fn clear(&mut self) {
        self.grads.iter_mut().for_each(|grad| grad.fill(0.0));
    }

    /// The gradient of one parameter.
    pub fn get(&self, id: ParamId) -> &[f32] {
        &self.grads[id.0]
    }

    /// The gradient of one parameter, to be added to.
    pub fn get_mut(&mut self, id: ParamId) -> &mut [f32] {
        &mut self.grads[id.0]
    }

    /// All gradients, in the order of the parameters.
    pub fn all(&self) -> &[Vec<f32>] {
        &self.grads
    }

    /// All gradients, in the order of the parameters, to be changed.
    pub fn all_mut(&mut self) -> &mut [Vec<f32>] {
        &mut self.grads
    }
}
