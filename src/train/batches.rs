//! Which rows make up each step: a pure function of the settings, the rows' lengths and the epoch.

use crate::config::Train;
use crate::config::train::{Plan, RowOrder};
use crate::data::order::{epoch_order, length_grouped_order};
use crate::data::packing::pack;

/// The rows of a run, alone or packed; what is shuffled and counted is called a unit.
#[derive(Clone, Debug)]
pub struct Batches {
    /// The rows of each unit; `None` where every row is one.
    packs: Option<Vec<Vec<u32>>>,
    /// Tokens of each unit.
    lengths: Vec<usize>,
    units_per_batch: usize,
    units_per_step: usize,
    seed: u64,
    order: RowOrder,
    drop_last: bool,
}

impl Batches {
    /// For rows of these lengths in tokens.
    pub fn new(train: &Train, lengths: Vec<usize>) -> Self {
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let packs = train.packing.then(|| pack(&lengths, train.max_length.unwrap_or(longest)));
        let lengths = match &packs {
            None => lengths,
            Some(packs) => packs.iter().map(|rows| rows.iter().map(|&row| lengths[row as usize]).sum()).collect(),
        };
        Self {
            packs,
            lengths,
            units_per_batch: train.per_device_train_batch_size,
            units_per_step: train.per_device_train_batch_size * train.gradient_accumulation_steps,
            seed: train.data_seed,
            order: train.order,
            drop_last: train.drop_last,
        }
    }

    /// Number of units.
    pub fn n_units(&self) -> usize {
        self.lengths.len()
    }

    /// The units of one pass over the data, in the order they are trained.
    pub fn epoch(&self, epoch: usize) -> Vec<u32> {
        let mut order = match self.order {
            RowOrder::Random => epoch_order(self.n_units(), self.seed, epoch as u64),
            RowOrder::Sequential => (0..self.n_units() as u32).collect(),
            RowOrder::GroupByLength => {
                length_grouped_order(&self.lengths, self.units_per_step, self.seed, epoch as u64)
            }
        };
        if self.drop_last {
            order.truncate(order.len() - order.len() % self.units_per_batch);
        }
        order
    }

    /// The rows of each micro-batch of one step;  order: that of the step's epoch, step: counted from the epoch's start.
    pub fn step(&self, order: &[u32], step: usize) -> Vec<Vec<u32>> {
        let units = &order[step * self.units_per_step..((step + 1) * self.units_per_step).min(order.len())];
        units.chunks(self.units_per_batch).map(|units| self.rows(units)).collect()
    }

    /// The rows of some units.
    fn rows(&self, units: &[u32]) -> Vec<u32> {
        match &self.packs {
            None => units.to_vec(),
            Some(packs) => units.iter().flat_map(|&unit| packs[unit as usize].iter().copied()).collect(),
        }
    }

    /// Tokens of the largest micro-batch of the run, of its first ten epochs if it has more.
    pub fn largest(&self, plan: &Plan) -> usize {
        let mut largest = 0;
        for epoch in 0..plan.epochs.min(10) {
            let steps = plan.steps_per_epoch.min(plan.total_steps - epoch * plan.steps_per_epoch);
            let order = self.epoch(epoch);
            for units in order[..order.len().min(steps * self.units_per_step)].chunks(self.units_per_step) {
                for units in units.chunks(self.units_per_batch) {
                    largest = largest.max(units.iter().map(|&unit| self.lengths[unit as usize]).sum());
                }
            }
        }
        largest
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::config::TrainOptions;
    use serde_json::{Value, json};

    fn batches(options: &Value, lengths: &[usize]) -> (Batches, Plan) {
        let mut all =
            json!({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2});
        all.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
        let train = serde_json::from_value::<TrainOptions>(all).unwrap().resolve().unwrap();
        let batches = Batches::new(&train, lengths.to_vec());
        let plan = train.plan(batches.n_units()).unwrap();
        (batches, plan)
    }

    #[test]
    fn every_row_is_trained_once_in_an_epoch_however_rows_are_put_together() {
        let lengths: Vec<usize> = (0..37).map(|row| 1 + row * 7 % 30).collect();
        for options in [
            json!({}),
            json!({"packing": true, "max_length": 32}),
            json!({"packing": true}),
            json!({"group_by_length": true}),
            json!({"packing": true, "max_length": 40, "group_by_length": true}),
        ] {
            let (batches, plan) = batches(&options, &lengths);
            for epoch in 0..plan.epochs {
                let order = batches.epoch(epoch);
                assert_eq!(order, batches.epoch(epoch), "a function of its arguments alone");
                let steps = (0..plan.steps_per_epoch).map(|step| batches.step(&order, step));
                let mut rows: Vec<u32> = steps.flatten().flatten().collect();
                rows.sort_unstable();
                assert!(rows.into_iter().eq(0..37), "{options}");
            }
            assert_ne!(batches.epoch(0), batches.epoch(1), "{options}");
        }
    }

    #[test]
    fn a_packed_row_counts_as_one_row() {
        let lengths = [10; 32];
        let (packed, plan) = batches(&json!({"packing": true, "max_length": 40}), &lengths);
        assert_eq!((packed.n_units(), plan.steps_per_epoch, plan.total_steps), (8, 2, 4));
        let step = packed.step(&packed.epoch(0), 1);
        assert_eq!(step.iter().map(Vec::len).collect::<Vec<_>>(), [8, 8]);
        assert_eq!(packed.largest(&plan), 80);
    }

    #[test]
    fn a_last_batch_that_is_not_full_may_be_left_out() {
        let lengths = [1; 11];
        let (whole, plan) = batches(&json!({}), &lengths);
        assert_eq!((whole.epoch(0).len(), plan.steps_per_epoch), (11, 3));
        let (dropped, plan) = batches(&json!({"dataloader_drop_last": true}), &lengths);
        assert_eq!((dropped.epoch(0), plan.steps_per_epoch), (whole.epoch(0)[..10].to_vec(), 3));
        let last = dropped.step(&dropped.epoch(1), 2);
        assert_eq!(last.iter().map(Vec::len).collect::<Vec<_>>(), [2]);
        let options = json!({"dataloader_drop_last": true, "per_device_train_batch_size": 12});
        let train = serde_json::from_value::<TrainOptions>(options).unwrap().resolve().unwrap();
        assert!(train.plan(11).unwrap_err().to_string().contains("dataloader_drop_last"));
    }

    #[test]
    fn the_largest_micro_batch_is_that_of_the_steps_that_are_run() {
        let mut lengths = [1; 12];
        lengths[7] = 100;
        let (all, plan) = batches(&json!({}), &lengths);
        assert_eq!(all.largest(&plan), 101);
        let at = all.epoch(0).iter().position(|&row| row == 7).unwrap();
        let (short, plan) = batches(&json!({"max_steps": 1}), &lengths);
        assert_eq!(short.largest(&plan), if at < 4 { 101 } else { 2 });
        let (in_order, _) = batches(&json!({"train_sampling_strategy": "sequential"}), &lengths);
        assert_eq!(in_order.epoch(3), (0..12).collect::<Vec<u32>>());
        let (grouped, plan) = batches(&json!({"max_steps": 1, "group_by_length": true}), &lengths);
        assert_eq!(grouped.largest(&plan), 101, "grouped by length, the longest row comes first");
    }
}
